// How a call is cut into tasks of about equal cost.
//
// A part is a node of the plan (without one: a sequence), all KV heads or, where they differ in their query heads or in what
// they see, one of them. Its query rows are cut into blocks and its tokens, of a selection the selected ones, into intervals;
// a task is a block, an interval and one KV head or several side by side. The tasks of a part that is all there is of its
// sequence, and not cut, write their results; the others leave partial results (sums over V, their maximum and their softmax
// mass), which are merged per query row, first those of the leaf, then those of its parents.
#pragma once
#include "cpu/attention_task.h"

KK_BEGIN

// What a token of a part costs, where a block of 4 query rows is 1. Measured, D 128: 64 rows take 9 to 11 times as long on
// bf16 pages, from memory as from cache, and 12 times on u2 pages.
inline double token_cost(int64_t rows) { return 0.4 + 0.15 * static_cast<double>(rows); }

constexpr double kSerialCost = 2048;  // waking other threads for less costs more than it saves: about 20 us of work
constexpr int64_t kMinSplit = 256;    // tokens that pay for preparing the queries again and for merging
constexpr int64_t kSideBySide =
    1024;  // tokens of a task with several heads; with fewer, threads would wait for the last one
constexpr int64_t kUncut = INT64_C(1) << 40;

struct Part {
  int64_t first_task;
  int64_t split;     // tokens of an interval
  int64_t partials;  // where its partial results begin among the floats of all, or -1: its tasks write results
  int64_t heads;     // KV heads of a task
};

// What a part consists of.
struct Shape {
  const int32_t* sequences;  // of a node of the plan; else null, and the sequence is `sequence`
  int64_t sequence;          // whose pages are read
  int64_t begin;             // where its first interval begins
  Visible visible;
  int64_t group, groups;             // KV heads
  int64_t rows, blocks, block_rows;  // query rows of one KV head; the last block may be smaller
  bool alone;                        // there is no other node of its sequence
  int64_t heads;                     // KV heads of a task

  int64_t columns() const { return groups * blocks; }                      // results of one interval
  int64_t tasks() const { return (groups + heads - 1) / heads * blocks; }  // of one interval
  double cost() const { return static_cast<double>(visible.tokens() * columns()) * token_cost(block_rows); }

  // Intervals begin at multiples of `split` from `begin`. Those between sinks and window do not exist.
  int64_t of_sinks(int64_t split) const { return (visible.sink + split - 1) / split; }
  int64_t skipped(int64_t split) const {
    const int64_t n = (visible.begin - begin) / split - of_sinks(split);
    return n > 0 ? n : 0;
  }
  int64_t intervals(int64_t split) const {
    const int64_t n = (visible.end - begin + split - 1) / split - skipped(split);
    return n > 0 ? n : 1;  // an empty sequence has a result too
  }
  int64_t interval_begin(int64_t i, int64_t split) const {
    return begin + (i < of_sinks(split) ? i : i + skipped(split)) * split;
  }
};

class Schedule {
 public:
  // Takes what it needs from the arena; where that only counts, nothing is written.
  Schedule(const AttentionParams& params, const CpuExec& exec, Arena& arena)
      : p(params), parts_per_node_(p.heads.mapped || p.head_windows || own_selection(p) ? p.Hkv : 1) {
    num_parts_ = (p.plan.nodes ? p.plan.num_nodes : p.B) * parts_per_node_;
    for (int i = 0; i < p.num_pools; ++i) any_packed_ |= packed(p.pools[i]);
    parts_ = arena.take<Part>(num_parts_);
    if (p.selection.index) {
      Visible* const v = arena.take<Visible>(num_parts_);
      for (int64_t i = 0; v && i < num_parts_; ++i) v[i] = visible_part(i);
      visible_ = v;
    }
    rank_ = p.plan.nodes ? arena.take<int32_t>(p.B) : nullptr;
    double cost = 0;
    for (int64_t i = 0; i < num_parts_; ++i) cost += shape(i).cost();
    threads_ = cost < kSerialCost ? 1 : exec.threads;
    const double share = cost / (threads_ * 4);  // four tasks per thread even out what the machine does to them
    int64_t partial_floats = 0;
    for (int64_t i = 0; i < num_parts_; ++i) {
      Shape s = shape(i);
      choose_heads(s, share);
      if (s.block_rows > max_rows_) max_rows_ = s.block_rows;
      if (s.heads > max_heads_) max_heads_ = s.heads;
      const int64_t split = choose_split(s, share), n = s.rows ? s.intervals(split) : 0;
      const bool partial = !s.alone || n > 1;
      if (parts_) parts_[i] = {tasks_, split, partial ? partial_floats : -1, s.heads};
      tasks_ += n * s.tasks();
      if (partial) partial_floats += n * s.columns() * partial_size(s);
    }
    if (rank_)
      for (int64_t i = 0; i < p.B; ++i) rank_[p.plan.order[i]] = static_cast<int32_t>(i);
    if (threads_ > tasks_) threads_ = tasks_ > 1 ? static_cast<int>(tasks_) : 1;
    scratch_bytes_ = Task::scratch_bytes(p, max_rows_, max_heads_);
    partials_ = arena.take<float>(partial_floats);
    scratch_ = arena.take<uint8_t>(threads_ * scratch_bytes_);
    merges_ = partial_floats > 0 || p.plan.nodes;
  }

  int threads() const { return threads_; }
  int64_t tasks() const { return tasks_; }
  bool merges() const { return merges_; }
  Arena scratch(int thread) const { return {scratch_ + thread * scratch_bytes_}; }
  int64_t max_rows() const { return max_rows_; }    // of a task and KV head
  int64_t max_heads() const { return max_heads_; }  // of a task
  const Part& part(int64_t node, int64_t g) const { return parts_[part_index(node, g)]; }

  // Task i of the call.
  struct Work {
    Block block;                    // of its first KV head
    int heads;                      // that follow one another
    int64_t from, to;               // tokens
    float* partial;                 // where the results of the first head go, or null: to the caller
    int64_t block_rows, next_head;  // from the results of a head to those of the next one
  };
  Work task(int64_t i) const {
    int64_t lo = 0, hi = num_parts_;
    while (hi - lo > 1) {
      const int64_t mid = (lo + hi) / 2;
      (parts_[mid].first_task <= i ? lo : hi) = mid;
    }
    const Part& part = parts_[lo];
    Shape s = shape(lo);
    s.heads = part.heads;
    const int64_t in_part = i - part.first_task, interval = in_part / s.tasks(), column = in_part % s.tasks();
    const int64_t head = column / s.blocks * s.heads, block = column % s.blocks, first = block * s.block_rows;
    const int64_t rows = s.rows - first < s.block_rows ? s.rows - first : s.block_rows;
    const int64_t from = s.interval_begin(interval, part.split), size = partial_size(s);
    const int64_t result = (interval * s.groups + head) * s.blocks + block;
    return {{s.sequence, s.group + head, s.sequences, s.visible, first, static_cast<int>(rows)},
            static_cast<int>(s.groups - head < s.heads ? s.groups - head : s.heads),
            from,
            from + part.split,
            part.partials < 0 ? nullptr : partials_ + part.partials + result * size,
            s.block_rows,
            s.blocks * size};
  }

  // What a node left of KV head g's query rows of sequence b, once per interval, `step` apart.
  struct Partials {
    const float* blocks;
    int64_t first_row, block_rows, block_size, channels, step, intervals;
    const float* sums(int64_t r) const { return block(r) + (first_row + r) % block_rows * channels; }
    const float* top(int64_t r) const { return block(r) + block_rows * channels + (first_row + r) % block_rows; }
    const float* mass(int64_t r) const { return top(r) + block_rows; }
    const float* block(int64_t r) const { return blocks + (first_row + r) / block_rows * block_size; }
  };
  Partials partials(int64_t node, int64_t b, int64_t g) const {
    const Part& part = parts_[part_index(node, g)];
    const Shape s = shape(part_index(node, g));
    const int64_t size = partial_size(s), before = p.plan.nodes ? rank_[b] - p.plan.nodes[node].first : 0;
    return {partials_ + part.partials + (g - s.group) * s.blocks * size,
            before * p.Tq * group_heads(p, g).n,
            s.block_rows,
            size,
            p.Dv,
            s.columns() * size,
            s.intervals(part.split)};
  }

 private:
  const AttentionParams& p;
  int64_t parts_per_node_, num_parts_;
  Part* parts_;                       // [num_parts]
  const Visible* visible_ = nullptr;  // [num_parts] of selections, whose ends are searched for once
  int32_t* rank_;                     // [B] where a sequence stands in the plan's order
  int threads_;
  int64_t tasks_ = 0, max_rows_ = 1, max_heads_ = 1;
  bool any_packed_ = false;
  float* partials_;  // of a task: [block_rows][Dv] sums, [block_rows] maxima, [block_rows] masses
  uint8_t* scratch_;
  int64_t scratch_bytes_;
  bool merges_;

  int64_t part_index(int64_t node, int64_t g) const { return parts_per_node_ == 1 ? node : node * p.Hkv + g; }
  int64_t partial_size(const Shape& s) const { return round_up(s.block_rows * (p.Dv + 2), 16); }

  int64_t node_of(int64_t i) const { return parts_per_node_ == 1 ? i : i / p.Hkv; }
  int64_t group_of(int64_t i) const { return parts_per_node_ == 1 ? 0 : i % p.Hkv; }
  Visible visible_part(int64_t i) const {  // without a plan
    const int64_t b = node_of(i), g = group_of(i);
    return p.selection.index ? visible_selected(p, b, g) : visible_tokens(p, b, g);
  }

  Shape shape(int64_t i) const {
    Shape s{};
    const int64_t node = node_of(i);
    s.group = group_of(i);
    s.groups = parts_per_node_ == 1 ? p.Hkv : 1;
    int64_t sequences = 1;
    if (p.plan.nodes) {
      const PlanNode& n = p.plan.nodes[node];
      if (n.first == n.last) return s;
      s.sequences = p.plan.order + n.first;
      s.sequence = s.sequences[0];
      sequences = n.last - n.first;
      s.begin = n.begin;
      s.visible = {0, n.begin, n.end};
      s.alone = sequences == 1 && n.parent < 0 && p.plan.leaf[s.sequence] == node;
    } else {
      s.sequence = node;
      s.visible = visible_ ? visible_[i] : visible_part(i);
      s.alone = true;
    }
    s.rows = sequences * p.Tq * group_heads(p, s.group).n;
    s.blocks = (s.rows + kMaxRows - 1) / kMaxRows;
    s.block_rows = s.blocks > 1 ? round_up((s.rows + s.blocks - 1) / s.blocks, 16) : s.rows;
    return s;
  }

  // As many heads as the rows of a task allow and as leave intervals of kSideBySide tokens. Packed pages are not bound by
  // memory, and the codes of a second head would push those of the first out of L1.
  void choose_heads(Shape& s, double share) const {
    s.heads = s.rows > 0 && s.blocks == 1 && !any_packed_ ? kMaxRows / s.rows : 1;
    if (s.heads > s.groups) s.heads = s.groups;
    const double tokens = s.rows > 0 ? share / token_cost(s.block_rows) : 0;
    while (threads_ > 1 && s.heads > 1 && tokens < static_cast<double>(s.heads * kSideBySide)) s.heads /= 2;
    if (s.heads < 1) s.heads = 1;
  }
  int64_t choose_split(const Shape& s, double share) const {
    if (p.split_tokens > 0) return p.split_tokens;
    if (threads_ == 1) return kUncut;
    const int64_t most = static_cast<int64_t>(share / (token_cost(s.block_rows) * static_cast<double>(s.heads)));
    const int64_t tokens = s.visible.tokens();
    const int64_t n = tokens / (most > kMinSplit ? most : kMinSplit) + 1;
    return n == 1 ? kUncut : round_up((tokens + n - 1) / n, kChunk);
  }
};

KK_END
