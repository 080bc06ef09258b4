// Streams that run nothing until somebody waits: every task happens as late as a GPU could let it happen.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace late {

using c10::StreamId;

// What a stream runs, and what makes it. A task is made when it is enqueued, and made anew by each replay of a graph.
using Task = std::function<void()>;
using Maker = std::function<Task()>;

constexpr StreamId kDefaultStream = 0;

// A place in a stream: everything that was enqueued before it.
struct Event {
  StreamId stream = kDefaultStream;
  int64_t position = 0;
};

StreamId current_stream();
StreamId exchange_stream(StreamId stream);
StreamId new_stream();

// On the current stream, or into the graph that it is captured into.
void enqueue(Maker make);
void enqueue_on(StreamId stream, Maker make);
Maker always(Task task);

Event record(StreamId stream);
void wait(StreamId stream, Event event);
bool is_done(Event event);
bool is_idle(StreamId stream);
int64_t n_pending();

// The host waits. Counted, unless a captured graph forbids it.
void synchronize(StreamId stream);
void synchronize(Event event);
void synchronize_device();

// Forget what has not run, after a failure.
void abandon();

// Graphs: between begin and end, what is enqueued on the stream of the capture is kept and does not run.
constexpr int64_t kNoGraph = -1;
int64_t graph_of_current_stream();
void begin_capture();
int64_t end_capture();
void replay(int64_t graph);
int64_t n_nodes(int64_t graph);
void drop_graph(int64_t graph);

// What the host asked of the device, by name, and how often it waited.
struct Counts {
  std::map<std::string, int64_t> operations;
  int64_t synchronizations = 0;
};
Counts& counts();
void count(const std::string& operation);

}  // namespace late
