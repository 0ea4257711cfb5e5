/* cuda_module.cpp: deltaops._cuda. Integers that are pointers in, calls of deltaops_cuda.h out. */
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "deltaops_cuda.h"

namespace py = pybind11;

namespace {

template <typename T>
T *pointer(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void raise_if(deltaops_status status) {
  switch (status) {
    case DELTAOPS_OK:
      return;
    case DELTAOPS_INVALID_ARGUMENT:
      throw py::value_error(deltaops_cuda_last_error());
    case DELTAOPS_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, deltaops_cuda_last_error());
      throw py::error_already_set();
    default:
      throw std::runtime_error(deltaops_cuda_last_error());
  }
}

py::object unavailable() {
  int32_t count = 0;
  const deltaops_status status = deltaops_cuda_device_count(&count);
  if (status != DELTAOPS_OK) return py::str(deltaops_cuda_last_error());
  if (count == 0) return py::str("CUDA works here and shows no GPU; check CUDA_VISIBLE_DEVICES");
  return py::none();
}

py::list devices() {
  int32_t count = 0;
  raise_if(deltaops_cuda_device_count(&count));
  py::list found;
  for (int32_t device = 0; device < count; ++device) {
    deltaops_cuda_device_info info = {};
    info.struct_size = sizeof info;
    raise_if(deltaops_cuda_describe(device, &info));
    py::dict row;
    row["name"] = info.name;
    row["capability"] = py::make_tuple(info.capability / 10, info.capability % 10);
    row["multiprocessors"] = info.multiprocessors;
    row["shared_memory"] = info.shared_memory;
    row["memory"] = info.memory;
    found.append(row);
  }
  return found;
}

void dropout_mask(int32_t device, std::uintptr_t keep, int64_t keep_stride, int64_t M, int64_t K,
                  std::uintptr_t seed, uint32_t branch_stream, uint32_t drop_threshold,
                  std::uintptr_t stream) {
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = deltaops_cuda_dropout_mask(device, pointer<uint8_t>(keep), keep_stride, M, K,
                                        pointer<const uint64_t>(seed), branch_stream,
                                        drop_threshold, pointer<void>(stream));
  }
  raise_if(status);
}

void dropout_apply(int32_t device, int32_t dtype, int64_t M, int64_t K, std::uintptr_t x,
                   int64_t x_stride, std::uintptr_t y, int64_t y_stride, std::uintptr_t seed,
                   uint32_t branch_stream, uint32_t drop_threshold, std::uintptr_t stream) {
  const deltaops_matrix from = {pointer<void>(x), M, K, x_stride, 1, dtype, 0};
  const deltaops_matrix to = {pointer<void>(y), M, K, y_stride, 1, dtype, 0};
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = deltaops_cuda_dropout_apply(device, &from, &to, pointer<const uint64_t>(seed),
                                         branch_stream, drop_threshold, pointer<void>(stream));
  }
  raise_if(status);
}

/* (address, rows, cols, row stride, column stride), or None for absent. */
deltaops_matrix matrix(const py::handle &view, int32_t dtype) {
  if (view.is_none()) return {};
  const auto [data, rows, cols, row_stride, col_stride] =
      view.cast<std::tuple<std::uintptr_t, int64_t, int64_t, int64_t, int64_t>>();
  return {pointer<void>(data), rows, cols, row_stride, col_stride, dtype, 0};
}

/* One output: (out, bias, its products). */
struct Gemm {
  std::vector<deltaops_cuda_product> products;
  deltaops_cuda_gemm_args args = {};

  Gemm(int32_t device, int32_t dtype, const py::handle &output, std::uintptr_t seed,
       std::uintptr_t stream) {
    const auto [out, bias, terms] = output.cast<std::tuple<py::object, py::object, py::list>>();
    for (const py::handle &term : terms) {
      const auto [left, right, threshold] =
          term.cast<std::tuple<py::object, py::object, uint32_t>>();
      products.push_back({matrix(left, dtype), matrix(right, dtype), threshold, 0});
    }
    args.struct_size = sizeof args;
    args.device = device;
    args.num_products = static_cast<int32_t>(products.size());
    args.bias = matrix(bias, dtype);
    args.out = matrix(out, dtype);
    args.seed = pointer<const uint64_t>(seed);
    args.stream = pointer<void>(stream);
  }
};

void hopper_gemm(int32_t device, int32_t dtype, const py::list &outputs, std::uintptr_t seed,
                 std::uintptr_t stream, int32_t multiprocessors) {
  std::vector<Gemm> gemms;
  for (const py::handle &output : outputs) gemms.emplace_back(device, dtype, output, seed, stream);
  std::vector<deltaops_cuda_gemm_args> args;
  for (const Gemm &gemm : gemms) {
    args.push_back(gemm.args);
    args.back().products = gemm.products.data();
    args.back().multiprocessors = multiprocessors;
  }
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = deltaops_cuda_hopper_gemm(args.data(), static_cast<int32_t>(args.size()));
  }
  raise_if(status);
}

/* The workspace must have room for the rows of x: hopper_project_gemm_workspace. */
void hopper_project_gemm(int32_t device, int32_t dtype, const py::tuple &layer, const py::handle &s,
                         const py::handle &s_narrow, const py::handle &out, float scaling,
                         int32_t blocks, std::uintptr_t workspace, uint64_t workspace_bytes,
                         std::uintptr_t stream) {
  const auto [x, weight, a, b, bias] =
      layer.cast<std::tuple<py::object, py::object, py::object, py::object, py::object>>();
  deltaops_cuda_hopper_project_gemm_args args = {};
  args.struct_size = sizeof args;
  args.device = device;
  args.x = matrix(x, dtype);
  args.weight = matrix(weight, dtype);
  args.a = matrix(a, dtype);
  args.b = matrix(b, dtype);
  args.bias = matrix(bias, dtype);
  args.s = matrix(s, DELTAOPS_F32);
  args.s_narrow = matrix(s_narrow, dtype);
  args.out = matrix(out, dtype);
  args.scaling = scaling;
  args.blocks = blocks;
  args.workspace = pointer<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.stream = pointer<void>(stream);
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = deltaops_cuda_hopper_project_gemm(&args);
  }
  raise_if(status);
}

void ampere_gemm(int32_t device, int32_t dtype, const py::tuple &output, std::uintptr_t seed,
                 std::uintptr_t stream) {
  Gemm gemm(device, dtype, output, seed, stream);
  gemm.args.products = gemm.products.data();
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = deltaops_cuda_ampere_gemm(&gemm.args);
  }
  raise_if(status);
}

/* (a, s, scaling, drop_threshold, branch_stream, seed) of each. */
std::vector<deltaops_cuda_branch> branches_of(const py::list &branches, int32_t dtype) {
  std::vector<deltaops_cuda_branch> found;
  for (const py::handle &branch : branches) {
    const auto [a, s, scaling, threshold, number, seed] =
        branch
            .cast<std::tuple<py::object, py::object, float, uint32_t, uint32_t, std::uintptr_t>>();
    found.push_back({matrix(a, dtype),
                     matrix(s, DELTAOPS_F32),
                     {},
                     scaling,
                     threshold,
                     number,
                     0,
                     pointer<const uint64_t>(seed)});
  }
  return found;
}

/* What both producers have in common, and the call. */
template <class Args>
void produce(deltaops_status (*call)(const Args *), Args args, int32_t device, int32_t dtype,
             const py::handle &y, const py::list &branches, std::uintptr_t stream) {
  const std::vector<deltaops_cuda_branch> found = branches_of(branches, dtype);
  args.struct_size = sizeof args;
  args.device = device;
  args.y = matrix(y, dtype);
  args.num_branches = static_cast<int32_t>(found.size());
  args.branches = found.data();
  args.stream = pointer<void>(stream);
  deltaops_status status;
  {
    py::gil_scoped_release unlocked;
    status = call(&args);
  }
  raise_if(status);
}

void rms_norm_project(int32_t device, int32_t dtype, const py::handle &x, const py::handle &gamma,
                      const py::handle &y, const py::handle &rstd, float eps,
                      const py::list &branches, std::uintptr_t stream) {
  deltaops_cuda_rms_norm_project_args args = {};
  args.x = matrix(x, dtype);
  args.gamma = matrix(gamma, dtype);
  args.rstd = matrix(rstd, DELTAOPS_F32);
  args.eps = eps;
  produce(&deltaops_cuda_rms_norm_project, args, device, dtype, y, branches, stream);
}

void swiglu_project(int32_t device, int32_t dtype, const py::handle &gate, const py::handle &up,
                    const py::handle &y, const py::list &branches, std::uintptr_t stream) {
  deltaops_cuda_swiglu_project_args args = {};
  args.gate = matrix(gate, dtype);
  args.up = matrix(up, dtype);
  produce(&deltaops_cuda_swiglu_project, args, device, dtype, y, branches, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() =
      "The CUDA library behind deltaops: raw pointers and strides in elements; see "
      "deltaops_cuda.h.";
  if (deltaops_cuda_abi_version() != DELTAOPS_CUDA_ABI_VERSION)
    throw py::import_error(
        "deltaops._cuda and libdeltaops_cuda.so must be of one build. Rebuild deltaops.");
  module.def("abi_version", &deltaops_cuda_abi_version, "The version of deltaops_cuda.h.");
  module.def("archs", &deltaops_cuda_archs,
             "The architectures compiled for, such as '80;90a;100'.");
  module.def("unavailable", &unavailable,
             "None when a GPU can be used here, else the reason in words.");
  module.def(
      "devices", &devices,
      "A dict per GPU: name, capability, multiprocessors, shared_memory (bytes that a block can "
      "opt in to) and memory (bytes). Raises RuntimeError where there is no driver.");
  module.def("dropout_mask", &dropout_mask, py::arg("device"), py::arg("keep"),
             py::arg("keep_stride"), py::arg("M"), py::arg("K"), py::arg("seed"),
             py::arg("branch_stream"), py::arg("drop_threshold"), py::arg("stream"),
             "keep[m, k] = 1 where the Philox draw keeps the element; all pointers on the GPU.");
  module.def("dropout_apply", &dropout_apply, py::arg("device"), py::arg("dtype"), py::arg("M"),
             py::arg("K"), py::arg("x"), py::arg("x_stride"), py::arg("y"), py::arg("y_stride"),
             py::arg("seed"), py::arg("branch_stream"), py::arg("drop_threshold"),
             py::arg("stream"),
             "y = dropped-out x, scaled; dtype 0 = f32, 1 = bf16; all pointers on the GPU.");
  module.def("hopper_gemm", &hopper_gemm, py::arg("device"), py::arg("dtype"), py::arg("outputs"),
             py::arg("seed"), py::arg("stream"), py::arg("multiprocessors") = 0,
             "For each (out, bias, products) of outputs: out = bias + the sum of mask * (left "
             "right^T) over its (left, right, drop_threshold). Matrices are (address, rows, cols, "
             "row stride, column stride) on the GPU, a bias may be None; dtype 1 = bf16, 2 = f16. "
             "On so many multiprocessors, 0: all.");
  module.def("hopper_project_gemm_workspace", &deltaops_cuda_hopper_project_gemm_workspace,
             py::arg("M"), "Bytes that hopper_project_gemm wants for M rows.");
  module.def(
      "hopper_project_gemm", &hopper_project_gemm, py::arg("device"), py::arg("dtype"),
      py::arg("layer"), py::arg("s"), py::arg("s_narrow"), py::arg("out"), py::arg("scaling"),
      py::arg("blocks"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
      "Of a layer (x, weight, a, b, bias), matrices as in hopper_gemm: s (fp32, or None) and "
      "s_narrow = scaling * x a^T, out = x weight^T + s_narrow b^T + bias; `blocks` make s, "
      "0: as many as the others leave over.");
  module.def("ampere_gemm", &ampere_gemm, py::arg("device"), py::arg("dtype"), py::arg("output"),
             py::arg("seed"), py::arg("stream"),
             "As hopper_gemm, of one (out, bias, products) and on any GPU from sm_80 on.");
  module.def("rms_norm_project", &rms_norm_project, py::arg("device"), py::arg("dtype"),
             py::arg("x"), py::arg("gamma"), py::arg("y"), py::arg("rstd"), py::arg("eps"),
             py::arg("branches"), py::arg("stream"),
             "y = RMSNorm of x, rstd (fp32, or None) of its rows, and of each (a, s, scaling, "
             "drop_threshold, branch_stream, seed) of branches s = scaling * drop(y) a^T, fp32.");
  module.def("swiglu_project", &swiglu_project, py::arg("device"), py::arg("dtype"),
             py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("branches"), py::arg("stream"),
             "y = silu(gate) * up, and s of branches as rms_norm_project.");
}
