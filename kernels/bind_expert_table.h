// An ExpertTable as Python holds it: what it was made of stays alive until nobody computes on it.
#pragma once
#include <nanobind/nanobind.h>

#include <utility>
#include <vector>

#include "bind_arrays.h"
#include "expert_table.h"

namespace shoal {

class BoundTable {
 public:
  BoundTable(const ExpertShape& shape, std::vector<const uint8_t*> experts,
             std::vector<ConstBytes> memory)
      : table_(shape, std::move(experts)), memory_(std::move(memory)) {}

  ExpertTable& table() { return table_; }
  int64_t num_hits() const { return table_.num_hits(); }

  // Computing is over for whom the table's `leave` was true.  With the GIL, so that it follows
  // `withdraw` whole.
  void end() {
    memory_.clear();
    const nanobind::object on_idle = std::exchange(on_idle_, nanobind::none());
    try {
      on_idle();
    } catch (nanobind::python_error& error) {
      error.discard_as_unraisable("ExpertTable.withdraw: on_idle");
    }
  }

  bool withdraw(nanobind::object on_idle) {
    require(!on_idle_.is_valid(), "withdraw: it was withdrawn before");
    on_idle_ = std::move(on_idle);
    if (!table_.withdraw()) return false;
    memory_.clear();
    on_idle_ = nanobind::none();
    return true;
  }

  // A call's presence.  It ends with the GIL held.
  struct Stay {
    BoundTable& at;
    ~Stay() {
      if (at.table_.leave()) at.end();
    }
  };

 private:
  ExpertTable table_;
  std::vector<ConstBytes> memory_;
  nanobind::object on_idle_;  // not valid before `withdraw`; None once it was called
};

}  // namespace shoal
