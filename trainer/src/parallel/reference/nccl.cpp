// A stand-in for NCCL, for the tests of nccl.rs: the signatures of nccl.h (version 2), ranks as threads of one process, and their
// memory as that of devices. A call returns when all ranks have made it.

#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Group {
    int ranks;
    std::mutex mutex;
    std::condition_variable all;
    int arrived = 0;
    long round = 0;
    std::vector<std::vector<float>> brought;

    // The last rank to come opens the way for all.
    void meet(std::unique_lock<std::mutex> &lock) {
        long mine = round;
        if (++arrived == ranks) {
            arrived = 0;
            ++round;
            all.notify_all();
        } else {
            all.wait(lock, [&] { return round != mine; });
        }
    }
};

std::mutex groups_mutex;
std::map<std::string, std::shared_ptr<Group>> groups;
int made = 0;

struct Communicator {
    std::shared_ptr<Group> group;
    int rank;
};

constexpr int success = 0, invalid_argument = 4, float32 = 7, sum = 0;

}  // namespace

extern "C" {

struct ncclUniqueId {
    char internal[128];
};

int ncclGetUniqueId(ncclUniqueId *id) {
    std::lock_guard<std::mutex> lock(groups_mutex);
    // Every byte of it counts: half an id is another one.
    std::memset(id->internal, 'a' + made % 20, sizeof id->internal);
    id->internal[127] = static_cast<char>(-1 - made++);
    return success;
}

int ncclCommInitRank(Communicator **communicator, int ranks, ncclUniqueId id, int rank) {
    std::shared_ptr<Group> group;
    {
        std::lock_guard<std::mutex> lock(groups_mutex);
        auto &found = groups[std::string(id.internal, sizeof id.internal)];
        if (!found) {
            found = std::make_shared<Group>();
            found->ranks = ranks;
            found->brought.resize(ranks);
        }
        group = found;
    }
    if (group->ranks != ranks || rank < 0 || rank >= ranks) return invalid_argument;
    *communicator = new Communicator{group, rank};
    std::unique_lock<std::mutex> lock(group->mutex);
    group->meet(lock);
    return success;
}

int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation, Communicator *communicator, void *) {
    if (count == 0 || type != float32 || operation != sum) return invalid_argument;
    Group &group = *communicator->group;
    std::unique_lock<std::mutex> lock(group.mutex);
    auto *values = static_cast<const float *>(send);
    group.brought[communicator->rank].assign(values, values + count);
    group.meet(lock);
    auto *sums = static_cast<float *>(receive);
    int code = success;
    for (size_t i = 0; i < count; ++i) {
        float total = 0;
        for (auto &brought : group.brought) {
            if (brought.size() != count) {
                code = invalid_argument;
                break;
            }
            total += brought[i];
        }
        sums[i] = total;
    }
    group.meet(lock);
    return code;
}

int ncclCommDestroy(Communicator *communicator) {
    delete communicator;
    return success;
}

int ncclCommAbort(Communicator *communicator) { return ncclCommDestroy(communicator); }

const char *ncclGetErrorString(int code) { return code == invalid_argument ? "invalid argument" : "no error"; }

}
