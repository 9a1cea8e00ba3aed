// A stand-in for NCCL: the signatures of nccl.h (version 2), with the host's memory for that of devices. Ranks are threads of one
// process (the tests of nccl.rs) or processes of one host (gpu/check.sh stand-in), and meet in shared memory.
//
// A sum on a stream is put there as the driver's stand-in has it, which makes it as late as it may: what is read before a stream or the
// host has waited for it is not the sum. Without a stream, a sum is made when it is asked for.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <fcntl.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

namespace {

constexpr int success = 0, system_error = 2, invalid_argument = 4, float32 = 7, sum = 0;
constexpr int most_ranks = 8;
// Values of each rank that are exchanged at once.
constexpr size_t piece = 1 << 18;

// Memory that the ranks share; fresh, it is all zeros.
struct Shared {
    std::atomic<unsigned> arrived, round;
    size_t counts[most_ranks];
    float brought[most_ranks][piece];
};

struct Communicator {
    Shared *shared;
    int ranks, rank;

    // Returns once all ranks are here; false if one does not come.
    bool meet() {
        unsigned mine = shared->round;
        if (++shared->arrived == unsigned(ranks)) {
            shared->arrived = 0;
            ++shared->round;
            return true;
        }
        auto last = std::chrono::steady_clock::now() + std::chrono::seconds(60);
        while (shared->round == mine) {
            if (std::chrono::steady_clock::now() > last) return false;
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
        return true;
    }

    int all_reduce(const float *values, float *sums, size_t count) {
        shared->counts[rank] = count;
        if (!meet()) return system_error;
        bool alike = true;
        for (int other = 0; other < ranks; ++other) alike = alike && shared->counts[other] == count;
        if (!meet()) return system_error;
        if (!alike) return invalid_argument;
        for (size_t start = 0; start < count; start += piece) {
            size_t length = count - start < piece ? count - start : piece;
            std::memcpy(shared->brought[rank], values + start, length * sizeof(float));
            if (!meet()) return system_error;
            for (size_t i = 0; i < length; ++i) {
                float total = 0;
                for (int other = 0; other < ranks; ++other) total += shared->brought[other][i];
                sums[start + i] = total;
            }
            if (!meet()) return system_error;
        }
        return success;
    }
};

struct Sum {
    Communicator *communicator;
    const float *values;
    float *sums;
    size_t count;

    static void make(void *of) {
        auto *self = static_cast<Sum *>(of);
        // Where it fails, a device would not end what it was given.
        if (int code = self->communicator->all_reduce(self->values, self->sums, self->count)) {
            std::fprintf(stderr, "stand-in: a sum over the ranks has failed (%d)\n", code);
            std::_Exit(1);
        }
        delete self;
    }
};

}  // namespace

extern "C" {

struct ncclUniqueId {
    char internal[128];
};

int ncclGetUniqueId(ncclUniqueId *id) {
    static std::atomic<int> made;
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    std::memset(id->internal, -1, sizeof id->internal);
    // Every byte of it counts: the name comes last, and half an id has none.
    std::string name = "/unimo-" + std::to_string(getpid()) + "-" + std::to_string(now.tv_nsec) + "-" + std::to_string(made++);
    if (name.size() > 60) return system_error;
    std::memcpy(id->internal + 64, name.c_str(), name.size() + 1);
    return success;
}

int ncclCommInitRank(Communicator **communicator, int ranks, ncclUniqueId id, int rank) {
    if (ranks > most_ranks || rank < 0 || rank >= ranks || id.internal[64] != '/') return invalid_argument;
    const char *name = id.internal + 64;
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return system_error;
    void *memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return system_error;
    auto *made = new Communicator{static_cast<Shared *>(memory), ranks, rank};
    if (!made->meet()) return system_error;
    // All have it open; nothing is left behind whatever happens.
    shm_unlink(name);
    *communicator = made;
    return success;
}

int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation, Communicator *communicator, void *stream) {
    if (count == 0 || type != float32 || operation != sum) return invalid_argument;
    auto *values = static_cast<const float *>(send);
    auto *sums = static_cast<float *>(receive);
    if (!stream) return communicator->all_reduce(values, sums, count);
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    auto launch = driver ? reinterpret_cast<int (*)(void *, void (*)(void *), void *)>(dlsym(driver, "cuLaunchHostFunc")) : nullptr;
    return launch && launch(stream, Sum::make, new Sum{communicator, values, sums, count}) == 0 ? success : system_error;
}

int ncclCommDestroy(Communicator *communicator) {
    munmap(communicator->shared, sizeof(Shared));
    delete communicator;
    return success;
}

int ncclCommAbort(Communicator *communicator) { return ncclCommDestroy(communicator); }

const char *ncclGetErrorString(int code) {
    return code == invalid_argument ? "invalid argument" : code == system_error ? "a system call or a rank has failed" : "no error";
}

}
