#include "memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <tuple>

namespace late {
namespace {

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

size_t round_up(size_t n_bytes, size_t smallest) {
  size_t room = smallest;
  while (room < n_bytes) room *= 2;
  return room;
}

void poison(void* memory, size_t n_bytes) { std::memset(memory, kPoison, n_bytes); }

// -- the device's memory: a list of free blocks for each stream, as torch's caching allocators have it --------------

struct DeviceBlock {
  char* begin = nullptr;
  size_t room = 0;
  size_t n_bytes = 0;
  StreamId stream = kDefaultStream;
  int64_t graph = kNoGraph;
  int64_t id = 0;
  bool is_live = false;
  std::set<StreamId> users;
};

// Blocks are handed out again to the stream, and to the graph, that they were allocated for.
using Place = std::tuple<int64_t, StreamId, size_t>;

struct Retired {
  void* memory;
  std::vector<Event> events;
};

struct DeviceMemory {
  std::map<void*, DeviceBlock> blocks;
  std::map<Place, std::vector<void*>> free;
  std::vector<Retired> retired;  // freed, but in use on other streams
  int64_t next_id = 0;
};

DeviceMemory& device_memory() {
  static auto* const memory = new DeviceMemory;
  return *memory;
}

void make_free(DeviceBlock& block) {
  device_memory().free[{block.graph, block.stream, block.room}].push_back(block.begin);
  // What a graph has freed itself it poisons in every replay; what is freed afterwards it still owns.
  if (block.graph == kNoGraph || block.graph == graph_of_current_stream()) {
    enqueue_on(block.stream, always([begin = block.begin, room = block.room] { poison(begin, room); }));
  }
}

void reclaim_retired() {
  auto& retired = device_memory().retired;
  const auto is_in_use = [](const Retired& r) { return !std::all_of(r.events.begin(), r.events.end(), is_done); };
  const auto idle = std::stable_partition(retired.begin(), retired.end(), is_in_use);
  const std::vector<Retired> ready(idle, retired.end());
  retired.erase(idle, retired.end());
  for (const Retired& r : ready) make_free(device_memory().blocks.at(r.memory));
}

void free_block(void* memory) {
  if (memory == nullptr) return;
  DeviceBlock& block = device_memory().blocks.at(memory);
  block.is_live = false;
  if (block.users.empty()) {
    make_free(block);
    return;
  }
  std::vector<Event> events;
  for (const StreamId stream : block.users) events.push_back(record(stream));
  block.users.clear();
  device_memory().retired.push_back({memory, std::move(events)});
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    if (n_bytes == 0) return {nullptr, nullptr, &free_block, kDevice};
    reclaim_retired();
    DeviceMemory& memory = device_memory();
    const size_t room = round_up(n_bytes, 512);
    auto& free = memory.free[{graph_of_current_stream(), current_stream(), room}];
    void* begin = nullptr;
    if (free.empty()) {
      begin = std::aligned_alloc(512, room);
      TORCH_CHECK(begin != nullptr, "no memory");
      poison(begin, room);
    } else {
      begin = free.back();
      free.pop_back();
    }
    memory.blocks[begin] = {static_cast<char*>(begin), room,  n_bytes, current_stream(), graph_of_current_stream(),
                            memory.next_id++,          true,  {}};
    return {begin, begin, &free_block, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t n_bytes) const override {
    enqueue(always([=] { std::memcpy(to, from, n_bytes); }));
  }
};

// The block with the largest address that is not beyond this one.
template <class Blocks>
auto* block_at(Blocks& blocks, const void* memory) {
  auto found = blocks.upper_bound(const_cast<void*>(memory));
  if (found == blocks.begin()) return static_cast<decltype(&found->second)>(nullptr);
  auto& block = (--found)->second;
  return static_cast<const char*>(memory) < block.begin + block.room ? &block : nullptr;
}

// -- pinned memory of the host: handed out again when the copies of it are done --------------------------------------

struct PinnedBlock {
  char* begin = nullptr;
  size_t room = 0;
  bool is_live = true;
  bool is_of_graph = false;  // allocated during a capture: once it was read, torch never hands it out again
  std::set<StreamId> users;
  std::vector<Event> events;
};

struct PinnedMemory {
  std::map<void*, PinnedBlock> blocks;
  bool reuses_at_once = false;
};

PinnedMemory& pinned_memory() {
  static auto* const memory = new PinnedMemory;
  return *memory;
}

bool is_read(const PinnedBlock& block) { return !std::all_of(block.events.begin(), block.events.end(), is_done); }

void free_pinned(void* memory) {
  if (memory == nullptr) return;
  PinnedBlock& block = pinned_memory().blocks.at(memory);
  if (block.is_of_graph && !block.users.empty()) return;
  block.is_live = false;
  block.events.clear();
  for (const StreamId stream : block.users) block.events.push_back(record(stream));
  block.users.clear();
  if (!is_read(block)) poison(block.begin, block.room);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    const c10::Device host(c10::kCPU);
    if (n_bytes == 0) return {nullptr, nullptr, &free_pinned, host};
    const size_t room = round_up(n_bytes, 64);
    PinnedMemory& memory = pinned_memory();
    for (auto& [begin, block] : memory.blocks) {
      if (block.is_live || block.room != room || (is_read(block) && !memory.reuses_at_once)) continue;
      block.is_live = true;
      block.is_of_graph = graph_of_current_stream() != kNoGraph;
      block.events.clear();
      poison(begin, room);
      return {begin, begin, &free_pinned, host};
    }
    void* begin = std::aligned_alloc(64, room);
    TORCH_CHECK(begin != nullptr, "no memory");
    poison(begin, room);
    memory.blocks[begin] = {static_cast<char*>(begin), room, true, graph_of_current_stream() != kNoGraph, {}, {}};
    return {begin, begin, &free_pinned, host};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t n_bytes) const override { std::memcpy(to, from, n_bytes); }
};

}  // namespace

c10::Allocator* device_allocator() {
  static auto* const allocator = new DeviceAllocator;
  return allocator;
}

c10::Allocator* pinned_allocator() {
  static auto* const allocator = new PinnedAllocator;
  return allocator;
}

std::vector<Block> live_blocks() {
  std::vector<Block> live;
  for (const auto& [begin, block] : device_memory().blocks) {
    const bool is_of_graph = block.graph != kNoGraph;
    if (!block.is_live && !is_of_graph) continue;
    live.push_back({reinterpret_cast<uintptr_t>(begin), block.n_bytes, block.id, is_of_graph});
  }
  return live;
}

void poison_free_blocks() {
  for (const auto& [begin, block] : device_memory().blocks) {
    if (!block.is_live && block.graph == kNoGraph) poison(block.begin, block.room);
  }
}

void use_on(const void* memory, StreamId stream) {
  auto* const block = block_at(device_memory().blocks, memory);
  if (block != nullptr && stream != block->stream) block->users.insert(stream);
}

void forget_graph(int64_t graph) {
  DeviceMemory& memory = device_memory();
  for (auto& [begin, block] : memory.blocks) {
    if (block.graph == graph) block.graph = kNoGraph;
  }
  for (auto it = memory.free.begin(); it != memory.free.end();) {
    it = std::get<0>(it->first) == graph ? memory.free.erase(it) : std::next(it);
  }
}

bool is_pinned(const void* memory) { return block_at(pinned_memory().blocks, memory) != nullptr; }

void use_pinned_on(const void* memory, StreamId stream) {
  auto* const block = block_at(pinned_memory().blocks, memory);
  TORCH_CHECK(block != nullptr, "this is no pinned memory");
  block->users.insert(stream);
}

void set_reuses_pinned_at_once(bool reuses) { pinned_memory().reuses_at_once = reuses; }

}  // namespace late
