#include "streams.h"

#include <c10/util/Exception.h>

#include <deque>
#include <limits>
#include <vector>

namespace late {
namespace {

struct Queue {
  std::deque<Task> tasks;
  int64_t n_enqueued = 0;
  int64_t n_done = 0;
};

struct Graph {
  StreamId stream;
  std::vector<Maker> nodes;
};

struct State {
  std::map<StreamId, Queue> queues;
  StreamId current = kDefaultStream;
  StreamId next = kDefaultStream + 1;
  std::map<int64_t, Graph> graphs;
  int64_t next_graph = 0;
  int64_t capturing = kNoGraph;
  StreamId before_capture = kDefaultStream;
  Counts counts;
};

// Never destroyed: tasks may hold Python objects, which outlive no interpreter.
State& state() {
  static auto* const state = new State;
  return *state;
}

bool is_captured(StreamId stream) {
  State& s = state();
  return s.capturing != kNoGraph && s.graphs.at(s.capturing).stream == stream;
}

// A task may make its stream wait for another one's event, which then runs from within it.
void run_until(Event event) {
  Queue& queue = state().queues[event.stream];
  while (queue.n_done < event.position && !queue.tasks.empty()) {
    const Task task = std::move(queue.tasks.front());
    queue.tasks.pop_front();
    ++queue.n_done;  // also where the task fails
    task();
  }
}

void check_may_wait() {
  TORCH_CHECK(state().capturing == kNoGraph, "the host may not wait for the device while a graph is captured");
  ++state().counts.synchronizations;
}

}  // namespace

StreamId current_stream() { return state().current; }

StreamId exchange_stream(StreamId stream) { return std::exchange(state().current, stream); }

StreamId new_stream() { return state().next++; }

void enqueue(Maker make) { enqueue_on(current_stream(), std::move(make)); }

void enqueue_on(StreamId stream, Maker make) {
  State& s = state();
  if (is_captured(stream)) {
    s.graphs.at(s.capturing).nodes.push_back(std::move(make));
    return;
  }
  Queue& queue = s.queues[stream];
  queue.tasks.push_back(make());
  ++queue.n_enqueued;
}

Maker always(Task task) {
  return [task = std::move(task)] { return task; };
}

Event record(StreamId stream) { return {stream, state().queues[stream].n_enqueued}; }

void wait(StreamId stream, Event event) {
  if (stream == event.stream) return;
  TORCH_CHECK(
      !is_captured(stream) && !is_captured(event.stream),
      "the late device captures one stream: it can't wait for another's event, nor another for its own");
  enqueue_on(stream, always([event] { run_until(event); }));
}

bool is_done(Event event) { return state().queues[event.stream].n_done >= event.position; }

bool is_idle(StreamId stream) { return state().queues[stream].tasks.empty(); }

int64_t n_pending() {
  int64_t n = 0;
  for (const auto& [stream, queue] : state().queues) n += static_cast<int64_t>(queue.tasks.size());
  return n;
}

void synchronize(StreamId stream) { synchronize(record(stream)); }

void synchronize(Event event) {
  check_may_wait();
  run_until(event);
}

void synchronize_device() {
  check_may_wait();
  for (const auto& [stream, queue] : state().queues) run_until({stream, queue.n_enqueued});
}

void abandon() {
  for (auto& [stream, queue] : state().queues) {
    queue.tasks.clear();
    queue.n_done = queue.n_enqueued;
  }
}

int64_t graph_of_current_stream() { return is_captured(current_stream()) ? state().capturing : kNoGraph; }

void begin_capture() {
  State& s = state();
  TORCH_CHECK(s.capturing == kNoGraph, "another graph is being captured");
  s.capturing = s.next_graph++;
  s.graphs[s.capturing].stream = new_stream();
  s.before_capture = exchange_stream(s.graphs[s.capturing].stream);
}

int64_t end_capture() {
  State& s = state();
  exchange_stream(s.before_capture);
  return std::exchange(s.capturing, kNoGraph);
}

void replay(int64_t graph) {
  TORCH_CHECK(state().capturing == kNoGraph, "a graph may not be replayed while another one is captured");
  for (const Maker& make : state().graphs.at(graph).nodes) enqueue(make);
}

int64_t n_nodes(int64_t graph) { return static_cast<int64_t>(state().graphs.at(graph).nodes.size()); }

void drop_graph(int64_t graph) { state().graphs.erase(graph); }

Counts& counts() { return state().counts; }

void count(const std::string& operation) { ++counts().operations[operation]; }

}  // namespace late
