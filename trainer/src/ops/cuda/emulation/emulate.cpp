// Runs the kernels on the CPU; see cuda.h. Compiled and loaded by emulation.rs.
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "../kernels/adamw.cu"
#include "../kernels/attention.cu"
#include "../kernels/attention_bf16.cu"
#include "../kernels/convolution.cu"
#include "../kernels/cross_entropy.cu"
#include "../kernels/cross_modal.cu"
#include "../kernels/elementwise.cu"
#include "../kernels/layer_norm.cu"
#include "../kernels/losses.cu"
#include "../kernels/rows.cu"

namespace emulation {
namespace {

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10, SHARED_BYTES = 48 << 10;
// Words behind a block's shared memory that it may not write.
constexpr size_t GUARD = 1 << 10;
constexpr float UNWRITTEN = std::numeric_limits<float>::quiet_NaN();

enum class At { running, warp_barrier, block_barrier, end };

struct Fiber {
    ucontext_t start;
    jmp_buf state;
    bool started = false;
    At at = At::end;
    std::unique_ptr<char[]> stack;
};

Fiber fibers[MOST_THREADS];
jmp_buf scheduler;
unsigned running;
Index block, block_threads, grid;
uint32_t words[MOST_THREADS];
// In turns: a lane may already show its next words while others still read these.
uint32_t of_lanes[2][MOST_THREADS][WORDS_SHOWN];
bool turn[MOST_THREADS];
alignas(32) unsigned char dynamic[SHARED_BYTES + GUARD * sizeof(float)];
std::string failure;

using Entry = void (*)(void**);
Entry entry;
void** arguments;

// setjmp and longjmp instead of swapcontext: the latter calls the kernel each time.
void back_to_scheduler() {
    if (!_setjmp(fibers[running].state)) _longjmp(scheduler, 1);
}

void fiber_main() {
    for (;;) {
        entry(arguments);
        fibers[running].at = At::end;
        back_to_scheduler();
    }
}

void resume(unsigned thread) {
    running = thread;
    Fiber& fiber = fibers[thread];
    fiber.at = At::running;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    fiber.stack.reset(new char[STACK_BYTES]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
}

// Warps, and the threads of each, run in an order of the caller's choice, and a warp goes as far as it can before the next one does: what
// depends on that lacks a barrier.
bool run_block(unsigned threads, unsigned shared_bytes, unsigned order) {
    float* shared = reinterpret_cast<float*>(dynamic);
    size_t own = (shared_bytes + 3) / 4;
    std::fill(shared, shared + own + GUARD, UNWRITTEN);
    auto pick = [&](unsigned i, unsigned of) { return order == 0 ? i : order == 1 ? of - 1 - i : (i * 17 + order) % of; };
    std::vector<bool> ready(threads, true);
    for (unsigned left = threads; left > 0;) {
        bool moved = false;
        for (unsigned w = 0; w < threads / WARP; w++) {
            unsigned warp = (order == 1 ? threads / WARP - 1 - w : (w + order) % (threads / WARP)) * WARP;
            for (bool goes_on = true; goes_on;) {
                unsigned at_warp = 0, ended = 0;
                for (unsigned i = 0; i < WARP; i++) {
                    unsigned thread = warp + pick(i, WARP);
                    if (!ready[thread]) continue;
                    resume(thread);
                    ready[thread] = false;
                    moved = true;
                    if (fibers[thread].at == At::end) left--;
                }
                for (unsigned thread = warp; thread < warp + WARP; thread++) {
                    at_warp += fibers[thread].at == At::warp_barrier;
                    ended += fibers[thread].at == At::end;
                }
                if (at_warp > 0 && ended > 0) {
                    failure = "a warp's shuffle lacks threads that have ended";
                    return false;
                }
                goes_on = at_warp == WARP;
                for (unsigned thread = warp; goes_on && thread < warp + WARP; thread++) ready[thread] = true;
            }
        }
        if (!moved) {
            failure = "threads wait for each other at different barriers";
            return false;
        }
        unsigned at_block = 0;
        for (unsigned thread = 0; thread < threads; thread++) at_block += fibers[thread].at == At::block_barrier;
        for (unsigned thread = 0; at_block > 0 && at_block == left && thread < threads; thread++) {
            if (fibers[thread].at == At::block_barrier) ready[thread] = true;
        }
    }
    for (size_t i = own; i < own + GUARD; i++) {
        if (std::memcmp(shared + i, &UNWRITTEN, sizeof UNWRITTEN) != 0) {
            failure = "a block writes beyond the shared memory that it was given";
            return false;
        }
    }
    return true;
}

template <typename... Parameters, size_t... Places>
void call(void (*kernel)(Parameters...), void** values, std::index_sequence<Places...>) {
    kernel(*static_cast<Parameters*>(values[Places])...);
}

template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** values) {
    call(kernel, values, std::index_sequence_for<Parameters...>());
}

// Bytes of each parameter.
template <typename... Parameters>
std::vector<size_t> parameters(void (*)(Parameters...)) {
    return {sizeof(Parameters)...};
}

struct Kernel {
    const char* name;
    Entry entry;
    std::vector<size_t> parameters;
};

#define KERNEL(name) Kernel{#name, [](void** values) { call(name, values); }, parameters(name)}
const Kernel kernels[] = {
    KERNEL(adamw),
    KERNEL(attention),
    KERNEL(attention_bf16),
    KERNEL(attention_bf16_32),
    KERNEL(attention_bf16_64),
    KERNEL(attention_bf16_delta_32),
    KERNEL(attention_bf16_delta_64),
    KERNEL(attention_bf16_keys_backward_32),
    KERNEL(attention_bf16_keys_backward_64),
    KERNEL(attention_bf16_queries_backward_32),
    KERNEL(attention_bf16_queries_backward_64),
    KERNEL(attention_delta),
    KERNEL(attention_delta_bf16),
    KERNEL(attention_keys_backward),
    KERNEL(attention_keys_backward_bf16),
    KERNEL(attention_queries_backward),
    KERNEL(attention_queries_backward_bf16),
    KERNEL(binary_cross_entropy),
    KERNEL(bounded_exp),
    KERNEL(bounded_exp_backward),
    KERNEL(column_sums),
    KERNEL(column_sums_bf16),
    KERNEL(cross_entropy_parts),
    KERNEL(cross_entropy_rows),
    KERNEL(cross_entropy_rows_bf16),
    KERNEL(cross_modal),
    KERNEL(cross_modal_backward),
    KERNEL(depthwise_relu6),
    KERNEL(depthwise_relu6_bf16),
    KERNEL(depthwise_relu6_input_backward),
    KERNEL(depthwise_relu6_input_backward_bf16),
    KERNEL(depthwise_relu6_weight_backward),
    KERNEL(depthwise_relu6_weight_backward_bf16),
    KERNEL(dropout_add),
    KERNEL(fill_rows),
    KERNEL(fill_rows_bf16),
    KERNEL(first_and_mean),
    KERNEL(first_and_mean_backward),
    KERNEL(gather_pieces),
    KERNEL(gelu),
    KERNEL(gelu_backward),
    KERNEL(gelu_backward_bf16),
    KERNEL(gelu_bf16),
    KERNEL(layer_norm),
    KERNEL(layer_norm_backward),
    KERNEL(layer_norm_backward_bf16),
    KERNEL(layer_norm_backward_bf16_1),
    KERNEL(layer_norm_backward_bf16_2),
    KERNEL(layer_norm_backward_bf16_3),
    KERNEL(layer_norm_backward_bf16_4),
    KERNEL(layer_norm_bf16),
    KERNEL(layer_norm_bf16_1),
    KERNEL(layer_norm_bf16_2),
    KERNEL(layer_norm_bf16_3),
    KERNEL(layer_norm_bf16_4),
    KERNEL(log_shares),
    KERNEL(log_shares_backward),
    KERNEL(pack_rows),
    KERNEL(pack_rows_backward),
    KERNEL(pack_rows_backward_bf16),
    KERNEL(pack_rows_bf16),
    KERNEL(patches),
    KERNEL(patches_backward),
    KERNEL(patches_backward_bf16),
    KERNEL(patches_bf16),
    KERNEL(relu),
    KERNEL(relu6),
    KERNEL(relu6_backward),
    KERNEL(relu6_backward_bf16),
    KERNEL(relu6_bf16),
    KERNEL(relu_backward),
    KERNEL(relu_product),
    KERNEL(relu_product_backward),
    KERNEL(root_of_sum),
    KERNEL(round_pieces),
    KERNEL(scale_by),
    KERNEL(scaled),
    KERNEL(select_rows),
    KERNEL(select_rows_bf16),
    KERNEL(select_sums),
    KERNEL(soft_cross_entropy),
    KERNEL(spread_rows),
    KERNEL(spread_rows_bf16),
    KERNEL(square_sums),
    KERNEL(squared_error),
    KERNEL(sum_of_two),
    KERNEL(sum_of_two_bf16),
    KERNEL(sum_rows),
    KERNEL(to_bf16),
    KERNEL(to_f32),
    KERNEL(total),
    KERNEL(unit_rows),
    KERNEL(unit_rows_backward),
};

}  // namespace

Index& block_index() { return block; }
Index& block_size() { return block_threads; }
Index& grid_size() { return grid; }
unsigned thread_number() { return running; }
void* dynamic_shared() { return dynamic; }
uint32_t& shown(unsigned thread) { return words[thread]; }

const uint32_t (*show(const uint32_t (&own)[WORDS_SHOWN]))[WORDS_SHOWN] {
    auto& shown = of_lanes[turn[running]];
    turn[running] = !turn[running];
    std::memcpy(shown[running], own, sizeof own);
    wait_for_warp();
    return shown + running / WARP * WARP;
}

void wait_for_block() {
    fibers[running].at = At::block_barrier;
    back_to_scheduler();
}

void wait_for_warp() {
    fibers[running].at = At::warp_barrier;
    back_to_scheduler();
}

}  // namespace emulation

// Runs a kernel; 0 for success, else emulation_failure() says why not.
extern "C" int emulation_launch(
    const char* name, const unsigned* blocks, unsigned threads, unsigned shared_bytes, void** values, unsigned count,
    unsigned order
) {
    using namespace emulation;
    if (threads == 0 || threads > MOST_THREADS || threads % WARP != 0 || shared_bytes > SHARED_BYTES) {
        failure = "a block of that size does not run on a device";
        return 1;
    }
    if (blocks[0] == 0 || blocks[1] == 0 || blocks[2] == 0 || blocks[1] > 0xffff || blocks[2] > 0xffff) {
        failure = "a grid of that size does not run on a device";
        return 1;
    }
    for (const Kernel& kernel : kernels) {
        if (std::string(kernel.name) != name) continue;
        if (kernel.parameters.size() != count) {
            failure = std::to_string(count) + " arguments for " + std::to_string(kernel.parameters.size()) + " parameters";
            return 1;
        }
        entry = kernel.entry;
        arguments = values;
        grid = {blocks[0], blocks[1], blocks[2]};
        block_threads = {threads, 1, 1};
        for (block.z = 0; block.z < grid.z; block.z++)
            for (block.y = 0; block.y < grid.y; block.y++)
                for (block.x = 0; block.x < grid.x; block.x++)
                    if (!run_block(threads, shared_bytes, order)) {
                        // Fibers that hang in the middle of a kernel start anew.
                        for (Fiber& fiber : fibers) fiber.started = false;
                        std::fill(turn, turn + MOST_THREADS, false);
                        return 1;
                    }
        return 0;
    }
    failure = "there is no such kernel";
    return 1;
}

extern "C" const char* emulation_failure() { return emulation::failure.c_str(); }
