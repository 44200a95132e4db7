// Python's door to call_server.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bind_expert_table.h"
#include "bindings.h"
#include "call_server.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace shoal {
namespace {

// A layer whose table Python made.
class BoundLayer : public ServedLayer {
 public:
  BoundLayer(nb::object table, int grid)
      : ServedLayer(nb::cast<BoundTable&>(table).table(), grid), table_(std::move(table)) {}
  ~BoundLayer() override {  // on any thread
    nb::gil_scoped_acquire acquired;
    table_.reset();
  }
  void end() override {
    nb::gil_scoped_acquire acquired;
    nb::cast<BoundTable&>(table_).end();
  }

 private:
  nb::object table_;
};

nb::bytes to_bytes(const std::string& data) { return nb::bytes(data.data(), data.size()); }

nb::tuple told(const Returned& r) {
  return nb::make_tuple(r.id, int(r.why), r.error, r.num_calls, r.received, r.sent, r.quiet_s,
                        to_bytes(r.unread), to_bytes(r.unsent), to_bytes(r.reply));
}

// Every method waits without the GIL: the server's thread may need it.
class BoundServer {
 public:
  BoundServer(size_t max_message_size, int64_t max_weight_bytes)
      : server_(max_message_size, max_weight_bytes) {
    require(kIsWireOrder, "CallServer: this machine's byte order is not the wire's");
  }
  ~BoundServer() { close(); }

  int news_fd() const { return server_.news_fd(); }
  uint64_t num_calls() const { return server_.num_calls(); }
  uint64_t num_rows() const { return server_.num_rows(); }
  bool is_answering() const { return server_.is_answering(); }

  uint64_t lend(int fd, uint32_t stream_id, size_t may_receive, size_t may_send,
                size_t max_frame_size) {
    nb::gil_scoped_release released;
    return server_.lend({fd, stream_id, may_receive, may_send, max_frame_size});
  }

  nb::object take_back(uint64_t id) {
    std::optional<Returned> returned;
    {
      nb::gil_scoped_release released;
      returned = server_.take_back(id);
    }
    return returned ? nb::object(told(*returned)) : nb::none();
  }

  nb::list news() {
    std::vector<Returned> news;
    {
      nb::gil_scoped_release released;
      news = server_.news();
    }
    nb::list all;
    for (const Returned& returned : news) all.append(told(returned));
    return all;
  }

  double quiet_s(uint64_t id) {
    nb::gil_scoped_release released;
    return server_.quiet_s(id);
  }

  void shut() {
    nb::gil_scoped_release released;
    server_.shut();
  }

  void open() {
    nb::gil_scoped_release released;
    server_.open();
  }

  void serve(const std::vector<std::tuple<uint32_t, nb::object, int>>& layers) {
    std::map<uint32_t, std::shared_ptr<ServedLayer>> served;
    for (const auto& [layer, table, grid] : layers) {
      require(nb::isinstance<BoundTable>(table), "serve: not an ExpertTable");
      require(grid >= -64 && grid <= 96, "grid must be in -64..96");
      served[layer] = std::make_shared<BoundLayer>(table, grid);
    }
    nb::gil_scoped_release released;
    server_.serve(std::move(served));
  }

  void close() {
    nb::gil_scoped_release released;
    server_.close();
  }

 private:
  CallServer server_;
};

}  // namespace

void bind_call_server(nb::module_& m) {
  nb::class_<BoundServer>(m, "CallServer", "Answers plain calls on lent sockets, on a thread.")
      .def(nb::init<size_t, int64_t>(), "max_message_size"_a, "max_weight_bytes"_a)
      .def_prop_ro("news_fd", &BoundServer::news_fd, "Readable while `news` has something.")
      .def_prop_ro("num_calls", &BoundServer::num_calls, "Calls answered.")
      .def_prop_ro("num_rows", &BoundServer::num_rows, "Their rows.")
      .def_prop_ro("is_answering", &BoundServer::is_answering, "Whether one is computed now.")
      .def("lend", &BoundServer::lend, "fd"_a, "stream_id"_a, "may_receive"_a, "may_send"_a,
           "max_frame_size"_a, "Answer what a socket brings; return the loan's id.")
      .def("take_back", &BoundServer::take_back, "id"_a,
           nb::sig("def take_back(self, id: int) -> tuple[int, int, int, int, int, int, float, "
                   "bytes, bytes, bytes] | None"),
           "End a loan; return what `news` tells of one that came back, None: it has told.")
      .def("news", &BoundServer::news,
           nb::sig("def news(self) -> list[tuple[int, int, int, int, int, int, float, bytes, "
                   "bytes, bytes]]"),
           "Sockets that came back, once: (id, why, errno, calls answered, bytes received, bytes "
           "sent, seconds since it was heard, unread, unsent, reply).")
      .def("quiet_s", &BoundServer::quiet_s, "id"_a, "Seconds since a lent socket was heard.")
      .def("shut", &BoundServer::shut, "Answer nothing until `open`; wait for what is computed.")
      .def("open", &BoundServer::open, "Answer again.")
      .def("serve", &BoundServer::serve, "layers"_a,
           "Answer for these (layer, table, grid), and no others.")
      .def("close", &BoundServer::close, "End the thread. Loans are left as they are.");
}

}  // namespace shoal
