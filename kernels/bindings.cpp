// The native module.  bind_*.cpp are the only files that know Python exists: they check shapes,
// drop the GIL, and call a kernel.
#include "bindings.h"

#include <cstdlib>
#include <string>

NB_MODULE(_kernels, m) {
  // What a thread or a module still holds when the interpreter ends is no user's business.
  const char* const debug = std::getenv("SHOAL_DEBUG");
  nanobind::set_leak_warnings(debug != nullptr && *debug != 0 && debug != std::string("0"));
  shoal::bind_matrices(m);
  shoal::bind_floats(m);
  shoal::bind_layer(m);
  shoal::bind_layer_runs(m);
  shoal::bind_store(m);
  shoal::bind_guess(m);
  shoal::bind_wire(m);
  shoal::bind_experts(m);
  shoal::bind_call_server(m);
  shoal::bind_fanout(m);
}
