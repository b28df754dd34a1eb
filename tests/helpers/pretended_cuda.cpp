// A CUDA device for a CPU build of PyTorch.
//
// Tensors report the device cuda:0 and are in host memory; every op runs the CPU's kernel, or, in a
// dry run, only allocates its outputs. Streams are numbers. The library has to be loaded before
// torch is imported (pretended_cuda_build.py); pretended_cuda.py is the Python half.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

c10::Device gpu() { return c10::Device(c10::DeviceType::CUDA, 0); }

// ---- streams -----------------------------------------------------------------------------------

// Nothing runs concurrently, so events need no state here; pretended_cuda.py orders streams by them.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static thread_local int64_t current;
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, gpu(), id); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return gpu(); }
  c10::Device getDevice() const override { return gpu(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<int64_t> last{0};
    return stream(++last);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const int64_t before = current;
    current = next.id();
    return stream(before);
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 1.0; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
thread_local int64_t Guard::current = 0;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- memory ------------------------------------------------------------------------------------

// The number identifies a block for good, since addresses are used again.
struct Block {
  int64_t number;
  int64_t bytes;
  int64_t stream;
  // Of pages from the system, not of the heap.
  bool mapped;
  std::vector<int64_t> recorded_streams;
};

std::mutex lock;
std::unordered_map<const void*, Block> blocks;
std::unordered_set<const void*> pinned_blocks;
// Per freed block: its number, its stream, the newest block's number at that time, the number of
// recorded streams, those streams.
std::vector<int64_t> freed_blocks;
int64_t last_number = 0, bytes_now = 0, bytes_peak = 0;
// Dry run: ops on floating-point tensors with more values than this only allocate their outputs.
// 0: every op computes.
std::atomic<int64_t> dry_numel{0};
// Whether attention reports the backend that an H200 takes instead of the unfused one.
std::atomic<bool> fused_attention{false};
// In a dry run, blocks from this size on are fresh pages from the system: zero, and without memory
// until they are written.
constexpr size_t MAPPED_BYTES = 1 << 22;
// Calls of ops on the device that are neither views nor only allocate, by name.
std::unordered_map<std::string, int64_t> calls;

Block* block_of(const Tensor& tensor) {
  if (!tensor.is_cuda() || !tensor.has_storage()) return nullptr;
  const auto found = blocks.find(tensor.storage().data());
  return found == blocks.end() ? nullptr : &found->second;
}

void free_block(void* start) {
  if (start == nullptr) return;
  size_t mapped_bytes = 0;
  {
    std::lock_guard<std::mutex> held(lock);
    const auto found = blocks.find(start);
    if (found != blocks.end()) {
      const Block& block = found->second;
      if (block.mapped) mapped_bytes = block.bytes;
      bytes_now -= block.bytes;
      const auto& streams = block.recorded_streams;
      freed_blocks.insert(freed_blocks.end(),
                          {block.number, block.stream, last_number,
                           static_cast<int64_t>(streams.size())});
      freed_blocks.insert(freed_blocks.end(), streams.begin(), streams.end());
      blocks.erase(found);
    }
  }
  if (mapped_bytes)
    munmap(start, mapped_bytes);
  else
    std::free(start);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = nullptr;
    if (bytes) {
      const bool mapped = dry_numel && bytes >= MAPPED_BYTES;
      if (mapped) {
        start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) throw std::bad_alloc();
      } else {
        if (posix_memalign(&start, 512, bytes)) throw std::bad_alloc();
        // Else NaN in every floating-point type, so that unwritten memory is seen.
        std::memset(start, dry_numel ? 0 : 0xFF,
                    dry_numel ? bytes : std::min<size_t>(bytes, 1 << 20));
      }
      std::lock_guard<std::mutex> held(lock);
      blocks[start] = {++last_number, static_cast<int64_t>(bytes), Guard::current, mapped, {}};
      bytes_now += bytes;
      bytes_peak = std::max(bytes_peak, bytes_now);
    }
    return {start, start, &free_block, gpu()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
DeviceMemory device_memory;
struct RegisterMemory {
  RegisterMemory() { c10::SetAllocator(c10::DeviceType::CUDA, &device_memory, 1); }
} register_memory;

void free_pinned(void* start) {
  if (start == nullptr) return;
  {
    std::lock_guard<std::mutex> held(lock);
    pinned_blocks.erase(start);
  }
  std::free(start);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = nullptr;
    if (bytes) {
      if (posix_memalign(&start, 512, bytes)) throw std::bad_alloc();
      std::lock_guard<std::mutex> held(lock);
      pinned_blocks.insert(start);
    }
    return {start, start, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
PinnedMemory pinned_memory;

// ---- what ATen asks CUDA -----------------------------------------------------------------------

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasCuDNN() const override { return true; }
  // Convolutions choose their memory format by this.
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 92000; }
  long versionRuntimeCuDNN() const override { return 92000; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return gpu(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* start) const override {
    std::lock_guard<std::mutex> held(lock);
    return pinned_blocks.count(start) > 0;
  }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(at::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

// The backend of scaled_dot_product_attention on an H200 with cuDNN above 9.15 (sdp_utils.cpp):
// cuDNN, else flash, else memory-efficient, which alone takes head dimensions above 256.
int64_t attention_backend(const Tensor& q, const Tensor&, const Tensor&,
                          const std::optional<Tensor>& mask, double, bool, std::optional<double>,
                          bool grouped) {
  using sdp::SDPBackend;
  if (!fused_attention) return static_cast<int64_t>(SDPBackend::math);
  const auto& context = at::globalContext();
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  const auto dim = q.sym_size(-1);
  auto backend = SDPBackend::math;
  if (context.userEnabledCuDNNSDP() && half && dim <= 128 && dim % 8 == 0)
    backend = SDPBackend::cudnn_attention;
  else if (context.userEnabledFlashSDP() && half && dim <= 256 && !mask.has_value())
    backend = SDPBackend::flash_attention;
  else if (context.userEnabledMemEfficientSDP() && !grouped)
    backend = SDPBackend::efficient_attention;
  return static_cast<int64_t>(backend);
}

// ---- ops that handle memory --------------------------------------------------------------------

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor host_view(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  const auto options = tensor.options().device(at::kCPU).requires_grad(false);
  if (!tensor.has_storage() || !tensor.storage().data())
    return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  const auto kept = tensor.storage();
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [kept](void*) {},
                       options);
}

bool runs_dry(const Tensor& tensor) {
  return dry_numel && tensor.is_floating_point() && tensor.numel() > dry_numel;
}

void count_call(const std::string& name) {
  std::lock_guard<std::mutex> held(lock);
  ++calls[name];
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  count_call("aten::copy_");
  if (!runs_dry(self)) host_view(self).copy_(host_view(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  host_view(to).copy_(host_view(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) const_cast<Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const Tensor& self) { return at::_local_scalar_dense(host_view(self)); }

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  const auto& storage = self.storage();
  if (bytes > storage.nbytes()) {
    auto larger = device_memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_view(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                 at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_view(self, std::move(source), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_view(self, source.storage(), source.storage_offset(), source.sizes(),
                  source.strides());
}

Tensor& set_empty(Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

// CUDA's allocator does not reuse the block before that stream has reached the time of its free.
void record_stream(Tensor& tensor, c10::Stream stream) {
  std::lock_guard<std::mutex> held(lock);
  if (Block* block = block_of(tensor)) block->recorded_streams.push_back(stream.id());
}

// ---- dry run -----------------------------------------------------------------------------------

Tensor on_meta(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_meta()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(),
                           tensor.options().device(at::kMeta).requires_grad(false));
}

IValue on_meta(const IValue& value) {
  if (value.isTensor()) return on_meta(value.toTensor());
  if (value.isDevice()) return c10::Device(c10::kMeta);
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(on_meta(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional<Tensor>(on_meta(*tensor)) : tensor);
    return list;
  }
  return value;
}

Tensor allocate_like(const Tensor& meta) {
  if (!meta.defined()) return meta;
  auto out = at::empty_strided(meta.sizes(), meta.strides(), meta.options().device(gpu()));
  // Lengths and indices that follow from it must be valid.
  if (out.numel() && !runs_dry(out)) std::memset(out.mutable_data_ptr(), 0, out.storage().nbytes());
  return out;
}

bool channels_last(const Tensor& tensor) {
  return tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// The output of an op: an argument that it writes, or new memory of the shape in `meta`.
IValue dry_output(const c10::FunctionSchema& schema, size_t index, const IValue& meta,
                  const std::vector<IValue>& arguments) {
  const auto* alias = schema.returns()[index].alias_info();
  if (alias != nullptr && alias->isWrite()) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* written = schema.arguments()[i].alias_info();
      if (written == nullptr || written->beforeSets() != alias->beforeSets()) continue;
      // An out= argument may be empty before the call.
      if (arguments[i].isTensor() && meta.isTensor() && !arguments[i].toTensor().numel())
        arguments[i].toTensor().resize_(meta.toTensor().sizes());
      return arguments[i];
    }
  }
  if (meta.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : meta.toTensorVector()) list.push_back(allocate_like(tensor));
    return list;
  }
  if (!meta.isTensor()) return meta;
  // cuDNN's convolutions return the memory format of their inputs, other than the meta kernel's.
  if (schema.name() == "aten::convolution" && meta.toTensor().dim() == 4 &&
      (channels_last(arguments[0].toTensor()) || channels_last(arguments[1].toTensor()))) {
    const auto& out = meta.toTensor();
    return empty(out.sizes(), out.scalar_type(), {}, {}, {}, at::MemoryFormat::ChannelsLast);
  }
  return allocate_like(meta.toTensor());
}

// Replace the arguments on the stack by outputs of the shapes that the meta kernel returns.
// Returns false if there is no meta kernel.
bool run_dry(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const std::vector<IValue> arguments(stack->end() - count, stack->end());
  Stack metas;
  for (const IValue& argument : arguments) metas.push_back(on_meta(argument));
  try {
    op.callBoxed(&metas);
  } catch (const std::exception&) {
    return false;
  }
  stack->erase(stack->end() - count, stack->end());
  for (size_t i = 0; i < metas.size(); ++i)
    stack->push_back(dry_output(schema, i, metas[i], arguments));
  return true;
}

// ---- every other op ----------------------------------------------------------------------------

// CUDA's kernels refuse tensors of two devices, except for numbers (no dimension) and indices.
bool takes_host_indices(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
         name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" ||
         name == "aten::_unsafe_index_put";
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  bool on_gpu = false, on_host = false, dry = false;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    on_gpu |= tensor.is_cuda();
    on_host |= !tensor.is_cuda() && tensor.dim() > 0;
    dry |= tensor.is_cuda() && runs_dry(tensor);
  };
  const auto& schema = op.schema();
  for (const IValue& value : torch::jit::last(*stack, schema.arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) look(tensor);
    if (value.isOptionalTensorList())
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        if (tensor) look(*tensor);
  }
  TORCH_CHECK(!(on_gpu && on_host) || takes_host_indices(schema.name()), schema.name(),
              " got tensors on cuda:0 and on cpu");
  count_call(schema.name());
  if (dry && run_dry(op, stack)) return;
  at::native::cpu_fallback(op, stack);
}

// Its forward op has a kernel for CUDA alone as well, and is computed by others on a CPU.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input,
                                             at::IntArrayRef shape, const Tensor& rstd,
                                             const std::optional<Tensor>& weight,
                                             std::array<bool, 2> wanted) {
  count_call("aten::_fused_rms_norm_backward");
  const bool weighted = weight && weight->defined();
  const Tensor grad_input = wanted[0] ? at::empty_like(input) : Tensor();
  const Tensor grad_weight = wanted[1] && weighted ? at::empty_like(*weight) : Tensor();
  if (runs_dry(input)) return {grad_input, grad_weight};
  const auto dtype = at::promote_types(input.scalar_type(), at::kFloat);
  const Tensor scale = host_view(rstd), out = host_view(grad).to(dtype);
  const Tensor normed = host_view(input).to(dtype) * scale;
  const Tensor inner = weighted ? out * host_view(*weight) : out;
  std::vector<int64_t> rows, columns;
  for (int64_t i = 0; i < input.dim(); ++i)
    (i < input.dim() - static_cast<int64_t>(shape.size()) ? rows : columns).push_back(i);
  if (grad_input.defined())
    host_view(grad_input).copy_(scale * (inner - normed * (inner * normed).mean(columns, true)));
  if (grad_weight.defined())
    host_view(grad_weight).copy_(rows.empty() ? out * normed : (out * normed).sum(rows));
  return {grad_input, grad_weight};
}

// ---- for pretended_cuda.py ---------------------------------------------------------------------

int64_t block_number(const Tensor& tensor) {
  std::lock_guard<std::mutex> held(lock);
  const Block* block = block_of(tensor);
  return block == nullptr ? 0 : block->number;
}

std::vector<int64_t> take_freed() {
  std::lock_guard<std::mutex> held(lock);
  return std::exchange(freed_blocks, {});
}

c10::Dict<std::string, int64_t> take_calls() {
  std::lock_guard<std::mutex> held(lock);
  c10::Dict<std::string, int64_t> counts;
  for (const auto& [name, count] : calls) counts.insert(name, count);
  calls.clear();
  return counts;
}

int64_t allocated() {
  std::lock_guard<std::mutex> held(lock);
  return bytes_now;
}

int64_t peak(bool reset) {
  std::lock_guard<std::mutex> held(lock);
  if (reset) bytes_peak = bytes_now;
  return bytes_peak;
}

int64_t current_stream() { return Guard::current; }

void run_dry_above(int64_t numel, bool fused) {
  dry_numel = numel;
  fused_attention = fused;
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &attention_backend)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("copy_", copy_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_view);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_empty);
  library.impl("record_stream", record_stream);
  // CUDA has kernels for these. Otherwise they are composed of other ops, which allocate and keep
  // more, before a dry run can ask for their shapes.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm",
                           "native_layer_norm", "_fused_rms_norm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("_fused_rms_norm_backward", rms_norm_backward);
}

TORCH_LIBRARY(pretended_cuda, library) {
  library.def("host_view(Tensor tensor) -> Tensor", host_view);
  library.def("block_number(Tensor tensor) -> int", block_number);
  library.def("take_freed() -> int[]", take_freed);
  library.def("take_calls() -> Dict(str, int)", take_calls);
  library.def("allocated() -> int", allocated);
  library.def("peak(bool reset=False) -> int", peak);
  library.def("current_stream() -> int", current_stream);
  library.def("runs_dry(Tensor tensor) -> bool", runs_dry);
  library.def("run_dry_above(int numel, bool fused=False) -> ()", run_dry_above);
}
