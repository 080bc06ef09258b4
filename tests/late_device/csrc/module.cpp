// What Python sees of the device; tests/late_device/device.py gives it its shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "device.h"
#include "memory.h"
#include "operators.h"
#include "streams.h"

namespace py = pybind11;

namespace late {
namespace {

// A Python function that a stream may hold, run and drop on any thread.
std::shared_ptr<py::function> shared(py::function function) {
  return {new py::function(std::move(function)), [](py::function* held) {
            const py::gil_scoped_acquire gil;
            delete held;
          }};
}

// `prepare` is called now, or by each replay of the graph that is being captured; what it returns runs on the stream.
void enqueue_kernel(py::function prepare) {
  count("kernel");
  enqueue([prepare = shared(std::move(prepare))]() -> Task {
    const py::gil_scoped_acquire gil;
    return [run = shared(py::function((*prepare)()))] {
      const py::gil_scoped_acquire gil;
      (*run)();
    };
  });
  release_uploads();
}

// (address, bytes, id, whether a graph owns it) of each block.
std::vector<std::tuple<uintptr_t, size_t, int64_t, bool>> describe_live_blocks() {
  std::vector<std::tuple<uintptr_t, size_t, int64_t, bool>> blocks;
  for (const Block& block : live_blocks()) blocks.emplace_back(block.address, block.n_bytes, block.id, block.is_of_graph);
  return blocks;
}

}  // namespace
}  // namespace late

PYBIND11_MODULE(late_device_extension, module) {
  using namespace late;
  module.def("register_device", &register_device);
  module.def("enqueue_kernel", &enqueue_kernel);
  module.def("live_blocks", &describe_live_blocks);
  module.def("synchronize", &synchronize_device);
  module.def("abandon", [] {
    abandon();
    poison_free_blocks();
  });
  module.def("n_pending", &n_pending);
  module.def("operations", [] { return counts().operations; });
  module.def("n_synchronizations", [] { return counts().synchronizations; });
  module.def("is_capturing", [] { return graph_of_current_stream() != kNoGraph; });
  module.def("begin_capture", &begin_capture);
  module.def("end_capture", &end_capture);
  module.def("replay", &replay);
  module.def("n_nodes", &n_nodes);
  module.def("drop_graph", [](int64_t graph) {
    drop_graph(graph);
    forget_graph(graph);
  });
  module.def("set_reuses_pinned_at_once", &set_reuses_pinned_at_once);
  module.def("set_holds_uploads", &set_holds_uploads);
}
