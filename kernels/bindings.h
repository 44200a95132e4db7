// What the files that know Python offer to bindings.cpp: each adds its functions to the module.
#pragma once
#include <nanobind/nanobind.h>

namespace shoal {

void bind_matrices(nanobind::module_& m);     // packing, matrix products, expert FFN, thread pool
void bind_experts(nanobind::module_& m);      // a layer's experts by number
void bind_call_server(nanobind::module_& m);  // answers calls on sockets
void bind_floats(nanobind::module_& m);       // norms, rope, attention, routing, combine, sampling
void bind_layer(nanobind::module_& m);        // decoder layers
void bind_layer_runs(nanobind::module_& m);   // many of them, with their experts
void bind_store(nanobind::module_& m);        // io_uring
void bind_guess(nanobind::module_& m);        // which experts to read ahead
void bind_wire(nanobind::module_& m);         // frames of calls and replies
void bind_fanout(nanobind::module_& m);       // a row's calls and replies on sockets

}  // namespace shoal
