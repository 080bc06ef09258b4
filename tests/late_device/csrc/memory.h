// The device's memory and pinned memory of the host: handed out again at once, and poisoned when it is freed.
#pragma once

#include <c10/core/Allocator.h>

#include <vector>

#include "streams.h"

namespace late {

// What freed memory is filled with, in the order of its stream: NaN, -1, and addresses that are nobody's.
constexpr int kPoison = 0xFF;

struct Block {
  uintptr_t address;
  size_t n_bytes;
  int64_t id;
  bool is_of_graph;  // a captured graph keeps its memory, whoever frees it
};

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();

// The blocks that are in use now.
std::vector<Block> live_blocks();

// What the streams would have poisoned, had they run.
void poison_free_blocks();

// Another stream uses this memory, as Tensor.record_stream says: it is not handed out again before that has run.
void use_on(const void* memory, StreamId stream);

// The graph is gone, and with it its memory, as far as no tensor has it.
void forget_graph(int64_t graph);

bool is_pinned(const void* memory);

// A copy on this stream reads or writes this pinned memory: it is not handed out again before that has run.
void use_pinned_on(const void* memory, StreamId stream);

// A fault on purpose: pinned memory is handed out again while copies of it are in flight.
void set_reuses_pinned_at_once(bool reuses);

}  // namespace late
