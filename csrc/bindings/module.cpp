// The module: exceptions, facts about the machine, and what each op binds in its own file.
#include "views.h"

using namespace pyfinetune;

namespace {

py::list isas() {
  py::list names;
  for (const char* const* name = runnable_isas(); *name; ++name) names.append(*name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pyfinetune; called through pyfinetune.ops, which checks and documents them.";
  py::register_exception_translator([](std::exception_ptr raised) {
    const auto raise = [](const char* name, const char* message) {
      const py::object type = py::module_::import("pyfinetune.errors").attr(name);
      PyErr_SetString(type.ptr(), message);
    };
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const InvalidInput& error) {
      raise("InvalidInput", error.what());
    } catch (const BackendUnavailable& error) {
      raise("BackendUnavailable", error.what());
    }
  });
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("isas", &isas, "The instruction sets that this machine can run, best first.");
  m.def("in_forked_child", &in_forked_child);
  m.def("advise_huge_pages", [](const py::object& tensor) {
    const TensorView view = view_of(tensor, "advise_huge_pages", "tensor");
    if (!view.on_cuda && is_contiguous(view))
      advise_huge_pages(view.data, numel(view, "tensor") * item_size(view.dtype));
  });
  bind_nf4(m);
  bind_lora_linear(m);
  bind_varlen_attn(m);
  bind_linear_cross_entropy(m);
  bind_rms_norm(m);
  bind_rope(m);
  bind_glu(m);
  bind_lora_thin(m);
  bind_cuda(m);
  m.attr("__version__") = PYFINETUNE_VERSION;
}
