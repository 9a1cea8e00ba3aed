// A stand-in for NVIDIA's driver, cuBLAS and cuRAND, as far as training calls them: device memory is memory of the host, and kernels
// run on the processor. Ours run as they are, threads as fibers (src/ops/cuda/emulation), candle's are written again in candle.h.
// So a build with the feature `cuda` trains from end to end without a device, and what surrounds the kernels is seen to work: calls,
// arguments, sizes, who owns which memory for how long. Nothing is to be read from its times.
//
// Stricter than a device where that tells of a mistake: memory that was allocated or given back holds NaNs, copies have to lie within
// one allocation, nothing is given back twice, and graphs hold kernels and products alone, whose workspace is the caller's. What would
// make the host wait for a device is counted, and told at the end where STAND_IN_REPORT is set; if to `kernels`, those by name too.
//
// Where STAND_IN_IDLE is set, nothing is computed, and a step's time is what the host takes to ask for it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unistd.h>
#include <vector>

#include "../../src/ops/cuda/emulation/emulate.cpp"

#include "candle.h"

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900;
// What a copy from the host's ordinary memory may be at most, if the host is not to wait.
constexpr size_t UNAWAITED_BYTES = 64 << 10;

std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;

struct Counts {
    unsigned long launches, products, graphs, of_graphs, largest_sum, copies_to, largest_to, long_copies_to, copies_from, waits, allocations;
} counts;

const bool idle = std::getenv("STAND_IN_IDLE");

std::map<uint64_t, size_t> allocated;
// Memory of the host's that the device reads by itself.
std::set<const void*> pinned;
size_t in_use;

int fail(int code, const std::string& why) {
    std::fprintf(stderr, "stand-in: %s\n", why.c_str());
    return code;
}

// How often each kernel was asked for.
std::map<std::string, unsigned long> by_name;

void report() {
    const char* what = std::getenv("STAND_IN_REPORT");
    if (!what) return;
    for (const auto& [name, count] : by_name) {
        if (std::string(what) == "kernels") std::fprintf(stderr, "stand-in: %6lu %s\n", count, name.c_str());
    }
    std::fprintf(
        stderr,
        "stand-in: %lu kernels (largest sum by one block: %lu values), %lu products, %lu graphs (of %lu of both), %lu allocations; %lu "
        "copies to the device (largest %lu bytes, %lu that a host may wait for), %lu from it, %lu other waits\n",
        counts.launches, counts.largest_sum, counts.products, counts.graphs, counts.of_graphs, counts.allocations, counts.copies_to,
        counts.largest_to, counts.long_copies_to, counts.copies_from, counts.waits
    );
}

// Whether a range lies in one allocation.
bool owned(uint64_t address, size_t bytes) {
    auto after = allocated.upper_bound(address);
    if (after == allocated.begin()) return false;
    auto [start, size] = *std::prev(after);
    return address + bytes <= start + size;
}

int allocate(uint64_t* address, size_t bytes) {
    Locked locked(lock);
    if (bytes == 0) return fail(INVALID_VALUE, "an allocation of nothing");
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) return 2;
    if (!idle) std::memset(memory, 0xff, bytes);
    *address = reinterpret_cast<uint64_t>(memory);
    allocated[*address] = bytes;
    in_use += bytes;
    counts.allocations++;
    return SUCCESS;
}

int give_back(uint64_t address) {
    Locked locked(lock);
    auto found = allocated.find(address);
    if (found == allocated.end()) return fail(INVALID_VALUE, "what is given back was not allocated");
    if (!idle) std::memset(reinterpret_cast<void*>(address), 0xff, found->second);
    in_use -= found->second;
    allocated.erase(found);
    std::free(reinterpret_cast<void*>(address));
    return SUCCESS;
}

// What a stream was asked for while it was captured.
using Graph = std::vector<std::function<int()>>;

// What a stream is asked for is done at once, but for copies from memory of the host's that the device reads by itself, and functions of
// the host's, which stand for the work of other libraries: those are done as late as they may, when somebody waits for them or the
// stream is asked for more.
struct Stream {
    Graph* captured = nullptr;
    std::deque<std::function<void()>> left;
    // How many of those it was ever asked for.
    size_t asked = 0;

    // All but those that were asked for after so many.
    void catch_up(size_t with) {
        while (!left.empty() && asked - left.size() < with) {
            auto next = std::move(left.front());
            left.pop_front();
            next();
        }
    }
};

// What a stream had been asked for when the event was recorded.
struct Event {
    Stream* stream = nullptr;
    size_t asked = 0;
    // How often somebody has asked whether it is there.
    unsigned queries = 0;

    bool is_there() const { return !stream || stream->left.empty() || stream->asked - stream->left.size() >= asked; }
    void wait() const {
        if (stream) stream->catch_up(asked);
    }
};

bool captures(void* stream) { return stream && static_cast<Stream*>(stream)->captured; }

void catch_up(void* stream) {
    if (stream) static_cast<Stream*>(stream)->catch_up(SIZE_MAX);
}

// Does what a stream is asked for, or has it captured.
int ask(void* stream, unsigned long& count, std::function<int()> call) {
    catch_up(stream);
    if (captures(stream)) return static_cast<Stream*>(stream)->captured->push_back(std::move(call)), SUCCESS;
    count++;
    return idle ? SUCCESS : call();
}

// What is neither kernel nor product is not captured here.
int refuse_if_captured(void* stream, const char* what) {
    catch_up(stream);
    return captures(stream) ? fail(CAPTURE_UNSUPPORTED, std::string(what) + " on a stream that is captured") : SUCCESS;
}

struct Blas {
    void* stream = nullptr;
    // The caller's.
    void* workspace = nullptr;
    size_t bytes = 0;
};

struct Found {
    std::string name;
    const emulation::Kernel* ours;
    const candle::Kernel* candles;
};

// Matrices column by column, as BLAS has them.
struct Gemm {
    bool transposed[2];
    size_t m, n, k, ld[3];
    const void *a, *b;
    void* c;
    bool bf16[2];
    float alpha, beta;
};

float read(const void* values, bool bf16, size_t at) {
    if (!bf16) return static_cast<const float*>(values)[at];
    return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[at]);
}

void multiply(const Gemm& of) {
    for (size_t column = 0; column < of.n; column++) {
        for (size_t row = 0; row < of.m; row++) {
            float sum = 0;
            for (size_t i = 0; i < of.k; i++) {
                size_t a = of.transposed[0] ? i + row * of.ld[0] : row + i * of.ld[0];
                size_t b = of.transposed[1] ? column + i * of.ld[1] : i + column * of.ld[1];
                sum += read(of.a, of.bf16[0], a) * read(of.b, of.bf16[0], b);
            }
            size_t at = row + column * of.ld[2];
            // Zero times what is in memory that nothing was written to is no number; BLAS does not read it then.
            float value = of.alpha * sum + (of.beta == 0 ? 0 : of.beta * read(of.c, of.bf16[1], at));
            if (of.bf16[1]) {
                static_cast<__nv_bfloat16*>(of.c)[at] = __float2bfloat16(value);
            } else {
                static_cast<float*>(of.c)[at] = value;
            }
        }
    }
}

constexpr int F32 = 0, BF16 = 14;

int multiply_batch(
    void* handle, const int* transposed, const int* sizes, const float* scales, const void* a, int type_a, int lda, long long stride_a, const void* b,
    int type_b, int ldb, long long stride_b, void* c, int type_c, int ldc, long long stride_c, int batch
) {
    Locked locked(lock);
    if (type_a != type_b || (type_a != F32 && type_a != BF16) || (type_c != F32 && type_c != BF16)) {
        return fail(15, "products of these types are not made here");
    }
    auto place = [](auto* values, int type, long long at) {
        using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(values)>>, const char, char>;
        return static_cast<Byte*>(values) + at * (type == BF16 ? 2 : 4);
    };
    std::vector<Gemm> all;
    for (int i = 0; i < batch; i++) {
        all.push_back({{transposed[0] != 0, transposed[1] != 0},
                       size_t(sizes[0]),
                       size_t(sizes[1]),
                       size_t(sizes[2]),
                       {size_t(lda), size_t(ldb), size_t(ldc)},
                       place(a, type_a, i * stride_a),
                       place(b, type_b, i * stride_b),
                       place(c, type_c, i * stride_c),
                       {type_a == BF16, type_c == BF16},
                       scales[0],
                       scales[1]});
    }
    Blas blas = *static_cast<Blas*>(handle);
    if (captures(blas.stream) && !blas.workspace) return fail(14, "cuBLAS would allocate its workspace within a graph");
    return ask(blas.stream, counts.products, [all, blas] {
        uint64_t workspace = reinterpret_cast<uint64_t>(blas.workspace);
        if (workspace && !owned(workspace, blas.bytes)) return fail(INVALID_VALUE, "cuBLAS's workspace is not allocated");
        // Whatever it has there.
        if (workspace) std::memset(blas.workspace, 0xff, std::min<size_t>(blas.bytes, 1 << 12));
        for (const Gemm& of : all) multiply(of);
        return SUCCESS;
    });
}

}  // namespace

extern "C" {

// The driver.
int cuInit(unsigned) {
    static bool once = (std::atexit(report), true);
    (void)once;
    return SUCCESS;
}
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : 101; }
int cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, size_t(length), "stand-in"), SUCCESS; }
// Every process has a device of its own.
int cuDeviceGetUuid_v2(char* uuid, int) {
    pid_t process = getpid();
    return std::memset(uuid, 7, 16), std::memcpy(uuid, &process, sizeof process), SUCCESS;
}
int cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t(16) << 30, SUCCESS; }
int cuMemGetInfo_v2(size_t* left, size_t* all) {
    Locked locked(lock);
    *all = size_t(16) << 30;
    *left = *all - in_use;
    return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    constexpr int MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76;
    *value = attribute == MULTIPROCESSORS ? 4 : attribute == MAJOR ? 8 : attribute == MINOR ? 0 : 1;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &counts, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &allocated, SUCCESS; }
int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
thread_local void* current;
int cuCtxSetCurrent(void* context) { return current = context, SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
int cuCtxSynchronize() { return counts.waits++, SUCCESS; }
int cuGetErrorName(int, const char** name) { return *name = "an error of the stand-in", SUCCESS; }
int cuGetErrorString(int, const char** text) { return *text = "see above", SUCCESS; }

int cuStreamCreate(void** stream, unsigned) { return *stream = new Stream, SUCCESS; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = captures(stream), SUCCESS; }
int cuStreamSynchronize(void* stream) {
    Locked locked(lock);
    counts.waits++;
    return refuse_if_captured(stream, "a wait");
}
int cuStreamBeginCapture_v2(void* stream, int) {
    Locked locked(lock);
    if (!stream || captures(stream)) return fail(CAPTURE_UNSUPPORTED, "this stream cannot be captured");
    return static_cast<Stream*>(stream)->captured = new Graph, SUCCESS;
}
int cuStreamEndCapture(void* stream, void** graph) {
    Locked locked(lock);
    if (!captures(stream)) return fail(INVALID_VALUE, "this stream is not captured");
    return *graph = std::exchange(static_cast<Stream*>(stream)->captured, nullptr), SUCCESS;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = new Graph(*static_cast<Graph*>(graph)), SUCCESS;
}
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }
int cuGraphExecDestroy(void* executable) { return delete static_cast<Graph*>(executable), SUCCESS; }
int cuGraphLaunch(void* executable, void* stream) {
    Locked locked(lock);
    if (int refused = refuse_if_captured(stream, "a graph")) return refused;
    counts.graphs++;
    for (const auto& call : *static_cast<Graph*>(executable)) {
        counts.of_graphs++;
        if (int failed = idle ? SUCCESS : call()) return failed;
    }
    return SUCCESS;
}
int cuStreamDestroy_v2(void* stream) { return cuStreamSynchronize(stream), delete static_cast<Stream*>(stream), SUCCESS; }
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* of) {
    Locked locked(lock);
    if (!stream || captures(stream)) return fail(CAPTURE_UNSUPPORTED, "a function of the host's on this stream");
    Stream& on = *static_cast<Stream*>(stream);
    on.left.push_back([function, of] { function(of); });
    return on.asked++, SUCCESS;
}
int cuStreamWaitEvent(void*, void* event, unsigned) {
    Locked locked(lock);
    return static_cast<Event*>(event)->wait(), SUCCESS;
}
int cuEventCreate(void** event, unsigned) { return *event = new Event, SUCCESS; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), SUCCESS; }
int cuEventRecord(void* event, void* stream) {
    Locked locked(lock);
    Stream* of = static_cast<Stream*>(stream);
    return *static_cast<Event*>(event) = {of, of ? of->asked : 0}, SUCCESS;
}
// Asking brings nothing about, but whoever asks again and again is to come to an end.
int cuEventQuery(void* event) {
    constexpr unsigned PATIENCE = 20;
    Locked locked(lock);
    Event& of = *static_cast<Event*>(event);
    if (of.is_there()) return SUCCESS;
    if (of.queries++ < PATIENCE) return NOT_READY;
    return of.wait(), SUCCESS;
}
int cuEventSynchronize(void* event) {
    Locked locked(lock);
    counts.waits += !static_cast<Event*>(event)->is_there();
    return static_cast<Event*>(event)->wait(), SUCCESS;
}

// cudarc's empty slices ask for nothing.
int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    if (captures(stream)) return refuse_if_captured(stream, "an allocation");
    return bytes == 0 ? (*address = 0, SUCCESS) : allocate(address, bytes);
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) { return counts.waits++, allocate(address, bytes); }
int cuMemFreeAsync(uint64_t address, void* stream) {
    if (int refused = refuse_if_captured(stream, "memory given back")) return refused;
    return address == 0 ? SUCCESS : give_back(address);
}
int cuMemFree_v2(uint64_t address) { return counts.waits++, give_back(address); }
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    Locked locked(lock);
    *memory = std::malloc(bytes);
    return pinned.insert(*memory), SUCCESS;
}
int cuMemFreeHost(void* memory) {
    Locked locked(lock);
    if (!pinned.erase(memory)) return fail(INVALID_VALUE, "what is given back to the host was not its own");
    return std::free(memory), SUCCESS;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    Locked locked(lock);
    if (captures(stream)) return refuse_if_captured(stream, "a copy to the device");
    if (bytes > 0 && !owned(to, bytes)) return fail(INVALID_VALUE, "a copy to the device leaves its allocation");
    auto copy = [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); };
    counts.copies_to++;
    counts.largest_to = std::max(counts.largest_to, (unsigned long)bytes);
    if (pinned.count(from) && stream) {
        Stream& on = *static_cast<Stream*>(stream);
        on.left.push_back(copy);
        return on.asked++, SUCCESS;
    }
    catch_up(stream);
    copy();
    counts.long_copies_to += bytes > UNAWAITED_BYTES;
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    Locked locked(lock);
    if (int refused = refuse_if_captured(stream, "a copy from the device")) return refused;
    if (!owned(from, bytes)) return fail(INVALID_VALUE, "a copy from the device leaves its allocation");
    std::memcpy(to, reinterpret_cast<void*>(from), bytes);
    counts.copies_from++;
    return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    Locked locked(lock);
    if (int refused = refuse_if_captured(stream, "a copy on the device")) return refused;
    if (!owned(to, bytes) || !owned(from, bytes)) return fail(INVALID_VALUE, "a copy on the device leaves its allocation");
    if (!idle) std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return SUCCESS;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    Locked locked(lock);
    if (int refused = refuse_if_captured(stream, "memory that is filled")) return refused;
    if (!owned(to, bytes)) return fail(INVALID_VALUE, "memory that is filled leaves its allocation");
    if (!idle) std::memset(reinterpret_cast<void*>(to), value, bytes);
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void*) { return *module = &counts, SUCCESS; }
int cuModuleUnload(void*) { return SUCCESS; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    Found found = {name, nullptr, candle::find(name)};
    for (const emulation::Kernel& kernel : emulation::kernels) {
        if (std::string(kernel.name) == name) found.ours = &kernel;
    }
    if (!found.ours && !found.candles) return fail(NOT_FOUND, std::string("there is no kernel ") + name);
    *function = new Found(found);
    return SUCCESS;
}
int cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
int cuLaunchKernel(
    void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z, unsigned shared,
    void* stream, void** values, void**
) {
    Locked locked(lock);
    const Found& found = *static_cast<Found*>(function);
    by_name[found.name]++;
    if (x == 0 || y == 0 || z == 0 || threads == 0) return fail(INVALID_VALUE, "a grid of nothing");
    if (found.candles) {
        counts.launches++;
        if (int refused = refuse_if_captured(stream, "a kernel of candle's")) return refused;
        if (found.name == "fast_sum_f32") counts.largest_sum = std::max<unsigned long>(counts.largest_sum, candle::argument<size_t>(values, 1));
        if (!idle) found.candles->run(values);
        return SUCCESS;
    }
    if (threads_y != 1 || threads_z != 1) return fail(INVALID_VALUE, "our kernels have threads along x alone");
    // Copies of the arguments, for whenever the kernel runs.
    const emulation::Kernel& kernel = *found.ours;
    std::vector<uint64_t> arguments(kernel.parameters.size());
    for (size_t i = 0; i < arguments.size(); i++) std::memcpy(&arguments[i], values[i], kernel.parameters[i]);
    return ask(stream, counts.launches, [=, &kernel] {
        std::vector<void*> places;
        for (const uint64_t& argument : arguments) places.push_back(const_cast<uint64_t*>(&argument));
        unsigned blocks[3] = {x, y, z};
        if (emulation_launch(kernel.name, blocks, threads, shared, places.data(), unsigned(places.size()), 0)) {
            return fail(LAUNCH_FAILED, std::string(kernel.name) + ": " + emulation_failure());
        }
        return SUCCESS;
    });
}

// cuBLAS.
int cublasCreate_v2(void** handle) { return *handle = new Blas, SUCCESS; }
int cublasDestroy_v2(void* handle) { return delete static_cast<Blas*>(handle), SUCCESS; }
// Its workspace is cuBLAS's own again.
int cublasSetStream_v2(void* handle, void* stream) { return *static_cast<Blas*>(handle) = {stream}, SUCCESS; }
int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    Blas& blas = *static_cast<Blas*>(handle);
    return blas = {blas.stream, workspace, bytes}, SUCCESS;
}
int cublasGemmEx(
    void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b,
    int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int, int
) {
    int transposed[] = {transpose_a, transpose_b}, sizes[] = {m, n, k};
    float scales[] = {*static_cast<const float*>(alpha), *static_cast<const float*>(beta)};
    return multiply_batch(handle, transposed, sizes, scales, a, type_a, lda, 0, b, type_b, ldb, 0, c, type_c, ldc, 0, 1);
}
int cublasGemmStridedBatchedEx(
    void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda,
    long long stride_a, const void* b, int type_b, int ldb, long long stride_b, const void* beta, void* c, int type_c, int ldc,
    long long stride_c, int batch, int, int
) {
    int transposed[] = {transpose_a, transpose_b}, sizes[] = {m, n, k};
    float scales[] = {*static_cast<const float*>(alpha), *static_cast<const float*>(beta)};
    return multiply_batch(
        handle, transposed, sizes, scales, a, type_a, lda, stride_a, b, type_b, ldb, stride_b, c, type_c, ldc, stride_c, batch
    );
}

// cuRAND, which candle opens and training does not use.
int curandCreateGenerator(void** generator, int) { return *generator = &counts, SUCCESS; }
int curandDestroyGenerator(void*) { return SUCCESS; }
int curandSetStream(void*, void*) { return SUCCESS; }
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }

}  // extern "C"
