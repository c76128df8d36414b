// A CUDA device that is not there, for torch's CPU build: tensors of device cuda:0 whose memory is the host's, and whose
// operators the CPU runs. Device guards, autograd's streams, optimisers and files take the branches that a GPU takes.
//
// Refused, as by a GPU: operators on tensors of both devices. Told to a callback: what a GPU is waited for (values that
// are read back) and what crosses the bus (copies between host and device). Random numbers are those of a generator of
// the device's own, which gives what the CPU's gives after the same seed. Loaded after torch, before its first use.
#define TORCH_ASSERT_ONLY_METHOD_OPERATORS
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

static const c10::Device kDevice(c10::DeviceType::CUDA, 0);
static const c10::Device kHost(c10::DeviceType::CPU);

using Callback = void (*)(const char*);
static Callback g_tell = nullptr;
extern "C" void fake_device_callback(Callback callback) { g_tell = callback; }
static void tell(const std::string& text) {
    if (g_tell) g_tell(text.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// What torch asks of a device beside operators: streams of which there is one, and whether it is there.

namespace c10::impl {
struct FakeGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
    Device exchangeDevice(Device) const override { return kDevice; }
    Device getDevice() const override { return kDevice; }
    Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
    Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kDevice); }
    Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
    void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
    void block(void*, const Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard);
}  // namespace c10::impl

struct FakeHooks final : at::CUDAHooksInterface {
    FakeHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex current_device() const override { return 0; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    int getNumGPUs() const override { return 1; }
    bool isPinnedPtr(const void*) const override { return false; }
    void deviceSynchronize(c10::DeviceIndex) const override { tell("wait: synchronize"); }
};
namespace at {
using ::FakeHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}  // namespace at

// ---------------------------------------------------------------------------------------------------------------------
// Memory: one piece has two storages, of the device and of the host, and each keeps the other alive.

static void drop(void* held) { delete static_cast<c10::Storage*>(held); }

static c10::Storage relabelled(const c10::Storage& storage, c10::Device device) {
    auto* held = new c10::Storage(storage);
    c10::DataPtr pointer(held->mutable_data(), held, drop, device);
    return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), c10::GetCPUAllocator(), true};
}

static at::Tensor tensor_of(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.is_neg()) made._set_neg(true);
    if (like.is_conj()) made._set_conj(true);
    return made;
}

// The tensors of one call: those of the device as the host sees them, and results the other way.
class Call {
public:
    at::Tensor on_host(const at::Tensor& tensor) {
        if (!tensor.defined()) return tensor;
        if (!tensor.is_cuda()) {
            has_host |= tensor.dim() > 0 && tensor.device().is_cpu();  // a number may come from anywhere
            return tensor;
        }
        has_device = true;
        auto [known, is_new] = host_of_.try_emplace(tensor.unsafeGetTensorImpl(), tensors_.size());
        if (!is_new) return tensors_[known->second].second;
        auto [place, is_other] = host_storage_of_.try_emplace(key(tensor.storage()), storages_.size());
        if (is_other) {
            storages_.emplace_back(tensor.storage(), relabelled(tensor.storage(), kHost));
            device_storage_of_[key(storages_.back().second)] = place->second;
        }
        tensors_.emplace_back(tensor, tensor_of(storages_[place->second].second, c10::DispatchKey::CPU, tensor));
        const at::Tensor& made = tensors_.back().second;
        device_of_[made.unsafeGetTensorImpl()] = known->second;
        return made;
    }

    at::Tensor on_device(const at::Tensor& tensor, bool new_ones) const {
        if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
        if (auto known = device_of_.find(tensor.unsafeGetTensorImpl()); known != device_of_.end())
            return tensors_[known->second].first;
        if (!new_ones) return tensor;
        auto known = device_storage_of_.find(key(tensor.storage()));
        const bool is_view = known != device_storage_of_.end();
        return tensor_of(is_view ? storages_[known->second].first : relabelled(tensor.storage(), kDevice),
                         c10::DispatchKey::CUDA, tensor);
    }

    // What the operator did to the sizes of its arguments.
    void follow() {
        for (auto& [device, host] : storages_) {
            if (host.data() == device.data() && host.nbytes() == device.nbytes()) continue;
            auto* held = new c10::Storage(host);
            c10::DataPtr pointer(held->mutable_data(), held, drop, kDevice);
            device.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(pointer));
            device.unsafeGetStorageImpl()->set_nbytes(held->nbytes());
        }
        for (auto& [device, host] : tensors_)
            if (device.sizes() != host.sizes() || device.strides() != host.strides() ||
                device.storage_offset() != host.storage_offset())
                device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }

    bool holds(const at::Tensor& host) const { return device_of_.count(host.unsafeGetTensorImpl()); }

    size_t count() const { return tensors_.size(); }

    bool has_host = false, has_device = false;

private:
    static const void* key(const c10::Storage& storage) { return storage.unsafeGetStorageImpl(); }

    std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // (of the device, of the host)
    std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
    std::unordered_map<const void*, size_t> host_of_, device_of_, host_storage_of_, device_storage_of_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers.

static at::Generator& device_generator() {
    static at::Generator generator = at::detail::createCPUGenerator(0);
    return generator;
}

// For as long as it lives, the CPU's operators draw from the device's generator.
class DrawingOnDevice {
public:
    explicit DrawingOnDevice(bool wanted) : wanted_(wanted) {
        if (!wanted_) return;
        before_ = host().get_state();
        host().set_state(device_generator().get_state());
    }
    ~DrawingOnDevice() {
        if (!wanted_) return;
        device_generator().set_state(host().get_state());
        host().set_state(before_);
    }

private:
    static at::Generator host() { return at::detail::getDefaultCPUGenerator(); }
    bool wanted_;
    at::Tensor before_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Operators.

static const std::unordered_set<std::string> kCopies = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"};
static const std::unordered_set<std::string> kIndexed = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
// Results whose size depends on values, values that go to the host, and decompositions that look at an error code.
static const std::unordered_set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_cholesky_ex", "aten::linalg_inv_ex",
    "aten::_linalg_solve_ex", "aten::linalg_eig", "aten::linalg_lstsq"};

static bool is_mask(const at::Tensor& index) {
    return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
}

static void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const std::string& name = schema.name();
    const size_t first = stack->size() - schema.arguments().size();
    const bool copies = kCopies.count(name), indexed = kIndexed.count(name);
    Call call;
    if (kWaits.count(name)) tell("wait: " + name);
    if (name == "aten::multinomial" && (stack->at(first + 1).toInt() == 1 || !stack->at(first + 2).toBool()))
        tell("wait: " + name);  // these look whether the probabilities are in range
    for (size_t i = first; i < stack->size(); ++i) {
        auto& value = (*stack)[i];
        if (value.isTensor()) {
            value = call.on_host(value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> made;
            for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(call.on_host(tensor));
            value = made;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> made;
            for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
                const bool there = tensor && tensor->defined();
                if (there && indexed && is_mask(*tensor)) tell("wait: " + name + " with a mask");
                if (there && indexed && tensor->device().is_cpu() && tensor->dim() > 0)
                    tell("host to device: indices of " + name);
                made.push_back(tensor ? std::optional<at::Tensor>(call.on_host(*tensor)) : std::nullopt);
            }
            value = made;
        } else if (value.isDevice() && value.toDevice().is_cuda()) {
            value = kHost;
        }
    }
    TORCH_CHECK(!call.has_host || !call.has_device || copies || indexed,
                "Expected all tensors to be on the same device, but ", name, " got tensors of cuda:0 and cpu");
    if (copies && (call.has_host || call.count() == 1)) {  // one of both is not of the device
        const at::Tensor& target = stack->at(first).toTensor();
        const std::string way = call.holds(target) ? "host to device: " : "device to host: ";
        tell(way + std::to_string(target.numel()) + " numbers");
    }
    {
        DrawingOnDevice drawing(op.hasTag(at::Tag::nondeterministic_seeded));
        at::AutoDispatchBelowADInplaceOrView guard;
        op.callBoxed(stack);
    }
    call.follow();
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
        auto& value = (*stack)[i];
        if (value.isTensor()) {
            value = call.on_device(value.toTensor(), !copies);
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> made;
            for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(call.on_device(tensor, !copies));
            value = made;
        }
    }
}

static at::Tensor& set_storage_at(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                                  c10::SymIntArrayRef stride) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
    std::vector<int64_t> strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
    if (strides.empty() && !sizes.empty()) {
        strides.assign(sizes.size(), 1);
        for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * sizes[i + 1];
    }
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
    self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.expect_int());
    return self;
}

static at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
    const int64_t numbers = int64_t(source.nbytes() / self.dtype().itemsize());
    return set_storage_at(self, std::move(source), 0, {c10::SymInt(numbers)}, {c10::SymInt(1)});
}

static int64_t plain_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               double, bool, std::optional<double>, bool) {
    return 0;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    // Operators that a GPU has kernels for, where torch would take them apart for a device that has none.
    for (const char* name :
         {"copy_", "convolution", "convolution_backward", "embedding_dense_backward", "native_batch_norm",
          "native_group_norm", "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward",
          "silu_backward", "native_dropout", "native_dropout_backward"})
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
    m.impl("set_.source_Storage", &set_storage);
    m.impl("set_.source_Storage_storage_offset", &set_storage_at);
    m.impl("_fused_sdp_choice", &plain_attention);
}

TORCH_LIBRARY(fake_device, m) {
    m.def("get_state() -> Tensor", [] { return device_generator().get_state(); });
    m.def("set_state(Tensor state) -> ()", [](const at::Tensor& state) { device_generator().set_state(state); });
    m.def("manual_seed(int seed) -> ()", [](int64_t seed) { device_generator().set_current_seed(uint64_t(seed)); });
}
