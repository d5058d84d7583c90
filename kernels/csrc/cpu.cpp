// Kernels for CPUs, reached through a C ABI without torch's headers, so that one build serves any version of torch.
//
// Vectors are GCC's, which any architecture has; the compiler splits them where registers are narrower.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#ifdef __linux__
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int TILE = 12;  // rows that are in registers at once, of which there are 32
#else
constexpr int LANES = 8;
constexpr int TILE = 6;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVector __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * LANES)));

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f;

#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE Vector load(const bfloat16* from) {
    HalfVector half;
    std::memcpy(&half, from, sizeof half);
    return (Vector)(__builtin_convertvector(half, BitVector) << 16);
}

INLINE void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

INLINE void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

// Something to do in parts, which several threads take one after the other. Whoever finds none left waits for those that
// are being done, and for nobody else: a thread that has lost its core to another process is not waited for unless it
// has a part. OpenMP's own barriers wait for all, and let threads sleep at once where the process has more of them than
// cores, and waking one takes longer than most of what is done between two barriers.
class Work {
  public:
    // Calls `run(first, end)` for parts of [0, count), up to `grain` long, until all of it is done.
    template <class F>
    void share(int64_t count, int64_t grain, F run) {
        for (int64_t first; (first = take(count, grain)) < count;) {
            const int64_t end = end_of(first, count, grain);
            run(first, end);
            done.fetch_add(end - first, std::memory_order_release);
        }
        for (int spins = 0; done.load(std::memory_order_acquire) < count; spins++) rest(spins);
    }

    // As `share`, but a thread that seems to have lost its core is not waited for: `compute(first, end)` is called by
    // another one too, and `put(first, end)`, which is short, by whichever is done first. So what `compute` makes is to
    // be kept where no other thread looks, and may come to nothing; what it reads may change meanwhile, if all is done
    // by then. Needs `states`, one for each of [0, count), 0 at first.
    template <class F, class G>
    void share_again(int64_t count, int64_t grain, F compute, G put) {
        const auto start = Clock::now();
        int64_t mine = 0;
        auto compute_part = [&](int64_t first) {
            const int64_t end = end_of(first, count, grain);
            compute(first, end);
            if (states[first].exchange(PUT) == PUT) return;
            put(first, end);
            done.fetch_add(end - first, std::memory_order_release);
        };
        for (int64_t first; (first = take(count, grain)) < count;) {
            compute_part(first);
            mine += end_of(first, count, grain) - first;
        }
        if (done.load(std::memory_order_acquire) >= count) return;
        const auto waiting = Clock::now();
        const std::chrono::nanoseconds part = mine ? (waiting - start) * grain / mine : std::chrono::microseconds(25);
        const auto patience = std::chrono::microseconds(5) + 2 * part;
        for (int spins = 0; done.load(std::memory_order_acquire) < count; spins++) {
            if (spins % 64 || Clock::now() - waiting < patience) {
                rest(spins);
                continue;
            }
            for (int64_t first = 0; first < count; first = end_of(first, count, grain)) {
                uint8_t expected = TAKEN;
                if (states[first].compare_exchange_strong(expected, TAKEN_AGAIN)) compute_part(first);
            }
        }
    }

    std::atomic<uint8_t>* states = nullptr;

  private:
    using Clock = std::chrono::steady_clock;
    enum State : uint8_t { TAKEN, TAKEN_AGAIN, PUT };  // of the part that begins there, once all are taken

    // Where the part ends that begins at `first`. The last quarter is in ever shorter ones, so that threads end
    // together, also where one of them gets less of its core than the others.
    static int64_t end_of(int64_t first, int64_t count, int64_t grain) {
        return std::min(count, first + std::clamp<int64_t>(4 * grain * (count - first) / count, 1, grain));
    }

    // Returns where a part begins that is now the caller's, or `count`.
    int64_t take(int64_t count, int64_t grain) {
        int64_t first = next.load(std::memory_order_relaxed);
        while (first < count && !next.compare_exchange_weak(first, end_of(first, count, grain))) {
        }
        return first;
    }

    // Some 100 us; then whoever else wants the core may have it.
    static void rest(int spins) {
        if (spins >= 4096)
            std::this_thread::yield();
        else
            relax();
    }

    std::atomic<int64_t> next{0}, done{0};
};

// Length of parts that are few enough to be worth taking, and many enough for all threads to have some.
INLINE int64_t grain_of(int64_t count, int num_threads) { return std::max<int64_t>(1, count / (num_threads * 8)); }

template <size_t... LANE>
INLINE Vector broadcast_to(std::index_sequence<LANE...>, float value) {
    return Vector{(static_cast<void>(LANE), value)...};
}

// One load. `Vector{} + value` would be an addition as well, since it makes 0 of -0.
INLINE Vector broadcast(float value) { return broadcast_to(std::make_index_sequence<LANES>(), value); }

// All lanes as one number, by halves: `both` joins two vectors, or two numbers.
template <class F>
INLINE float reduce(Vector vector, F both) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eights[LANES / 8];
    std::memcpy(eights, &vector, sizeof vector);
    if constexpr (LANES == 16) eights[0] = both(eights[0], eights[1]);
    Four fours[2];
    std::memcpy(fours, eights, sizeof fours);
    const Four four = both(fours[0], fours[1]);
    return both(both(four[0], four[2]), both(four[1], four[3]));
}

INLINE float sum_of(Vector vector) {
    return reduce(vector, [](auto a, auto b) { return a + b; });
}

// Of lanes with a NaN, one of the others or NaN.
INLINE float largest_of(Vector vector) {
    return reduce(vector, [](auto a, auto b) { return a > b ? a : b; });
}

// Sets of sums for so many of them at once: with few, several sets hide the latency of additions.
constexpr int num_sets(int num_sums) { return num_sums >= 8 ? 1 : num_sums >= 4 ? 2 : 4; }

// Calls `run` with the number of rows, at most TILE, as a constant.
template <class F, int R = TILE>
INLINE void with_rows(int num_rows, F run) {
    if constexpr (R > 1)
        if (num_rows < R) return with_rows<F, R - 1>(num_rows, run);
    run(std::integral_constant<int, R>());
}

// 2^x with a relative error of 2e-7, for x <= 0; 0 below 2^-125; NaN stays NaN.
INLINE Vector exp2_of_negative(Vector x) {
    const Vector shift = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector least = broadcast(-125.f);
    Vector clamped = x < least ? least : x;
    Vector shifted = clamped + shift;
    Vector rest = clamped - (shifted - shift);
    Vector power = broadcast(1.535336188319500e-4f);
    power = power * rest + broadcast(1.339887440266574e-3f);
    power = power * rest + broadcast(9.618437357674640e-3f);
    power = power * rest + broadcast(5.550332471162809e-2f);
    power = power * rest + broadcast(2.402264791363012e-1f);
    power = power * rest + broadcast(6.931472028550421e-1f);
    power = power * rest + broadcast(1.f);
    BitVector exponent = ((BitVector)shifted - 0x4B400000u + 127u) << 23;
    Vector result = power * (Vector)exponent;
    return x < least ? Vector{} : result;
}

// ---- attention
//
// Flash attention (Dao et al., 2022): keys are visited KEYS at a time, with a running maximum and sum for each row.
// A row is one query head of one token. The G query heads of a KV head read the same keys, so the rows of a request
// under a KV head are its tokens times G, and a task has at most ROWS of them.
//
// Of each KV head a block of S tokens holds the keys as [H, S], so that GROUP scores are computed at once without a sum
// across a vector, and the values as [S, H].

constexpr int GROUP = 16;  // tokens whose scores are computed at once
constexpr int GROUPS = 8;
constexpr int KEYS = GROUP * GROUPS;
constexpr int ROWS = 48;

struct Cache {
    const void* keys;
    const void* values;
    int num_kv_heads, head_size, block_size;
};

// Successive tokens of a request: where their queries are and their outputs go, the tokens before them, and the blocks
// of all.
struct Query {
    int first_token, first_out, num_tokens, context_len;
    const int32_t* blocks;
};

struct Task {
    Query query;
    int head, first_row, num_rows;
    int64_t cost;
};

// scores[r][t] = sum over d of q[d][r] * k[d][t], for R rows and GROUP tokens.
template <int R, class T>
INLINE void score(const float* q, int head_size, const T* k, int64_t k_stride, float* scores, const T* next_k,
                  const T* v) {
    constexpr int VECTORS = GROUP / LANES, SETS = num_sets(R * VECTORS);
    Vector sums[SETS][R][VECTORS] = {};
    for (int d = 0; d < head_size; d += SETS) {
        // Of the group after this one, and of this one's values: they may be in other blocks, where no hardware looks.
        for (int set = 0; set < SETS; set++) {
            __builtin_prefetch(next_k + (d + set) * k_stride);
            __builtin_prefetch(v + (d + set) * GROUP);
        }
        for (int set = 0; set < SETS; set++) {
            Vector row[VECTORS];
            for (int part = 0; part < VECTORS; part++) row[part] = load(k + (d + set) * k_stride + part * LANES);
            for (int r = 0; r < R; r++) {
                Vector factor = broadcast(q[(d + set) * R + r]);
                for (int part = 0; part < VECTORS; part++) sums[set][r][part] += factor * row[part];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int part = 0; part < VECTORS; part++) {
            Vector sum = sums[0][r][part];
            for (int set = 1; set < SETS; set++) sum += sums[set][r][part];
            store(scores + r * KEYS + part * LANES, sum);
        }
}

// out[r][d] += sum over t of weights[r][t] * v[t][d], for R rows and C vectors of columns.
template <int R, int C, class T>
INLINE void accumulate(const float* weights, const T* const* v, int num_groups, int head_size, float* out, int column) {
    Vector sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(out + r * head_size + column + c * LANES);
    for (int group = 0; group < num_groups; group++)
        for (int t = 0; t < GROUP; t++) {
            Vector row[C];
            for (int c = 0; c < C; c++) row[c] = load(v[group] + t * head_size + column + c * LANES);
            for (int r = 0; r < R; r++) {
                Vector factor = broadcast(weights[r * KEYS + group * GROUP + t]);
                for (int c = 0; c < C; c++) sums[r][c] += factor * row[c];
            }
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * head_size + column + c * LANES, sums[r][c]);
}

// As `accumulate`, for all columns from `column` on, C vectors at a time.
template <int R, int C, class T>
INLINE void accumulate_from(int column, const float* weights, const T* const* v, int num_groups, int head_size,
                            float* out) {
    for (; column + C * LANES <= head_size; column += C * LANES)
        accumulate<R, C, T>(weights, v, num_groups, head_size, out, column);
    if constexpr (C > 1) accumulate_from<R, C / 2, T>(column, weights, v, num_groups, head_size, out);
}

// Turns a row's scores into weights, and scales what the row has summed up so far to the new maximum.
INLINE void softmax_row(float* scores, int num_keys, int first_visible, int end_visible, float* maximum, float* sum,
                        float* out, int head_size) {
    for (int key = 0; key < std::min(first_visible, num_keys); key++) scores[key] = -INFINITE;
    for (int key = std::max(end_visible, 0); key < num_keys; key++) scores[key] = -INFINITE;
    Vector largest = load(scores);
    for (int key = LANES; key < num_keys; key += LANES) {
        Vector other = load(scores + key);
        largest = other > largest ? other : largest;
    }
    const float here = largest_of(largest);
    const float now = here > *maximum || std::isnan(here) ? here : *maximum;
    if (now == -INFINITE) {  // the row sees none of these keys, nor any before
        std::memset(scores, 0, sizeof(float) * num_keys);
        return;
    }
    const float shrink = *maximum == now ? 1.f : exp2_of_negative(broadcast(*maximum - now))[0];
    Vector sums = {};
    for (int key = 0; key < num_keys; key += LANES) {
        Vector weight = exp2_of_negative(load(scores + key) - broadcast(now));
        store(scores + key, weight);
        sums += weight;
    }
    *sum *= shrink;
    *sum += sum_of(sums);
    if (shrink != 1.f)
        for (int d = 0; d < head_size; d += LANES) store(out + d, load(out + d) * broadcast(shrink));
    *maximum = now;
}

struct Step {
    const float* q;
    int64_t q_stride;
    float* out;
    int num_heads;
    float scale;
    int window;  // 0 for none
};

// Computes a task into the buffer; `finish` puts it in its place.
template <class T>
void attend(const Step& step, const Cache& cache, const Task& task, float* buffer) {
    const int H = cache.head_size, S = cache.block_size, G = step.num_heads / cache.num_kv_heads;
    const Query& query = task.query;
    const int context_len = query.context_len, num_rows = task.num_rows;
    float *q = buffer, *out = q + ROWS * H, *scores = out + ROWS * H, *maxima = scores + ROWS * KEYS;
    float* sums = maxima + ROWS;
    auto token_of = [&](int row) { return (task.first_row + row) / G; };
    auto head_of = [&](int row) { return (int64_t)task.head * G + (task.first_row + row) % G; };

    // The rows of a tile side by side, [H, R], so that their places are constants: with registers for twelve of them,
    // moving these took as long as multiplying.
    for (int r = 0; r < num_rows; r++) {
        const float* from = step.q + (query.first_token + token_of(r)) * step.q_stride + head_of(r) * H;
        const int tile = r / TILE * TILE, num_in_tile = std::min(TILE, num_rows - tile);
        for (int d = 0; d < H; d++) q[tile * H + d * num_in_tile + r - tile] = from[d] * (step.scale * LOG2_E);
        maxima[r] = -INFINITE;
        sums[r] = 0.f;
    }
    std::memset(out, 0, sizeof(float) * num_rows * H);

    const int end = context_len + token_of(num_rows - 1) + 1;
    const int first_seen = step.window ? std::max(0, context_len + token_of(0) + 1 - step.window) : 0;
    for (int first_key = first_seen / GROUP * GROUP; first_key < end; first_key += KEYS) {
        const int num_groups = std::min(GROUPS, (end - first_key + GROUP - 1) / GROUP);
        const T *k[GROUPS + 1], *v[GROUPS + 1];
        for (int group = 0; group <= num_groups; group++) {
            const int position = std::min(first_key + group * GROUP, end - 1);
            const int64_t head = ((int64_t)query.blocks[position / S] * cache.num_kv_heads + task.head) * H * S;
            k[group] = static_cast<const T*>(cache.keys) + head + position % S;
            v[group] = static_cast<const T*>(cache.values) + head + (int64_t)(position % S) * H;
        }
        for (int group = 0; group < num_groups; group++)
            for (int r = 0; r < num_rows; r += TILE)
                with_rows(std::min(TILE, num_rows - r), [&](auto rows) {
                    score<rows.value, T>(q + r * H, H, k[group], S, scores + r * KEYS + group * GROUP, k[group + 1],
                                         v[group]);
                });
        const int num_keys = num_groups * GROUP;
        for (int r = 0; r < num_rows; r++) {
            const int position = context_len + token_of(r);
            const int first_visible = step.window ? position + 1 - step.window - first_key : 0;
            softmax_row(scores + r * KEYS, num_keys, first_visible, position + 1 - first_key, maxima + r, sums + r,
                        out + r * H, H);
        }
        for (int r = 0; r < num_rows; r += TILE)
            with_rows(std::min(TILE, num_rows - r), [&](auto rows) {
                constexpr int R = rows.value, C = R == 1 ? 8 : R <= 3 ? 4 : 2;
                accumulate_from<R, C, T>(0, scores + r * KEYS, v, num_groups, H, out + r * H);
            });
    }
}

void finish(const Step& step, const Cache& cache, const Task& task, const float* buffer) {
    const int H = cache.head_size, G = step.num_heads / cache.num_kv_heads;
    const float *out = buffer + ROWS * H, *sums = out + ROWS * H + ROWS * KEYS + ROWS;
    for (int r = 0; r < task.num_rows; r++) {
        const int64_t token = task.query.first_out + (task.first_row + r) / G;
        float* to = step.out + (token * step.num_heads + (int64_t)task.head * G + (task.first_row + r) % G) * H;
        for (int d = 0; d < H; d++) to[d] = out[r * H + d] / sums[r];
    }
}

std::vector<Task> make_tasks(const std::vector<Query>& queries, int num_heads, int num_kv_heads) {
    const int G = num_heads / num_kv_heads;
    std::vector<Task> tasks;
    for (const Query& query : queries) {
        for (int row = 0; row < query.num_tokens * G; row += ROWS) {
            const int num_rows = std::min(ROWS, query.num_tokens * G - row);
            const int64_t num_keys = query.context_len + (row + num_rows - 1) / G + 1;
            for (int head = 0; head < num_kv_heads; head++)
                tasks.push_back({query, head, row, num_rows, (num_rows + TILE) * num_keys});
        }
    }
    // The longest first, so that no thread begins one when the others are done.
    std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    return tasks;
}

// Numbers that `attend` needs of its own.
int64_t buffer_size(int head_size) { return ROWS * (2 * head_size + KEYS + 2); }

// Each thread calls this.
template <class T>
void attend_some(const Step& step, const Cache& cache, const std::vector<Task>& tasks, Work& work, float* buffer) {
    auto compute = [&](int64_t task, int64_t) { attend<T>(step, cache, tasks[task], buffer); };
    auto put = [&](int64_t task, int64_t) { finish(step, cache, tasks[task], buffer); };
    if (work.states) return work.share_again(tasks.size(), 1, compute, put);
    work.share(tasks.size(), 1, [&](int64_t task, int64_t end) { compute(task, end), put(task, end); });
}

template <class T>
void attend_all(const Step& step, const Cache& cache, const std::vector<Task>& tasks) {
    Work work;
#pragma omp parallel num_threads(std::min<int>(omp_get_max_threads(), tasks.size()))
    {
        std::vector<float> buffer(buffer_size(cache.head_size));
        attend_some<T>(step, cache, tasks, work, buffer.data());
    }
}

// A block is cleared when its first slot is written: see kv_write.py.
template <class T>
void clear_block(T* pool, int64_t block, int64_t block_elements) {
    std::memset(pool + block * block_elements, 0, sizeof(T) * block_elements);
}

// k and v are a token's keys and values, [K, H].
template <class T>
void write_token(const T* k, const T* v, T* keys, T* values, int32_t slot, int num_kv_heads, int H, int S) {
    const int64_t block = slot / S * ((int64_t)num_kv_heads * H * S), offset = slot % S;
    for (int head = 0; head < num_kv_heads; head++) {
        T* to = keys + block + (int64_t)head * H * S + offset;
        for (int d = 0; d < H; d++) to[(int64_t)d * S] = k[head * H + d];
        std::memcpy(values + block + (head * S + offset) * H, v + head * H, sizeof(T) * H);
    }
}

template <class T>
void write_all(const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* keys, T* values, const int32_t* slots,
               int64_t num_tokens, const int32_t* new_blocks, int64_t num_new_blocks, int num_kv_heads, int H, int S) {
    const int64_t block_elements = (int64_t)num_kv_heads * H * S;
#pragma omp parallel if (num_tokens * num_kv_heads * H > 1 << 15)
    {
#pragma omp for
        for (int64_t index = 0; index < num_new_blocks; index++)
            for (T* pool : {keys, values}) clear_block(pool, new_blocks[index], block_elements);
#pragma omp for
        for (int64_t token = 0; token < num_tokens; token++)
            write_token(k + token * k_stride, v + token * v_stride, keys, values, slots[token], num_kv_heads, H, S);
    }
}

// ---- matrix products
//
// A weight [O, I] is laid out in panels of PANEL outputs, [O / PANEL, I, PANEL], the last one filled up with zeros. So the
// weight is read once from one end to the other, and a panel's part of DEPTH inputs stays in the L2 cache while all
// rows of x go by. The L1 cache is too small for panels so long that sums need not be put aside in between.

constexpr int PANEL = 2 * LANES;
constexpr int64_t DEPTH = 2048;
constexpr int AHEAD = 32;  // inputs: 4 KB of a panel where vectors are longest

// y[r][o] = start[r][o] + sum over i of x[r][i] * panel[i][o], for R rows and the PANEL outputs of a panel. The panel is
// fetched ahead: the more rows there are, the fewer inputs a core looks ahead by itself, and then it would either wait
// for memory or multiply.
template <int R>
INLINE void multiply(const float* x, int64_t x_stride, const float* panel, int64_t depth, const float* start,
                     int64_t start_stride, float* y, int64_t y_stride) {
    constexpr int VECTORS = PANEL / LANES, SETS = num_sets(R * VECTORS);
    Vector sums[SETS][R][VECTORS] = {};
    for (int r = 0; r < R; r++)
        for (int part = 0; part < VECTORS; part++) sums[0][r][part] = load(start + r * start_stride + part * LANES);
    auto add = [&](int set, int64_t i) {
        Vector weights[VECTORS];
        for (int part = 0; part < VECTORS; part++) weights[part] = load(panel + i * PANEL + part * LANES);
        for (int r = 0; r < R; r++) {
            Vector factor = broadcast(x[r * x_stride + i]);
            for (int part = 0; part < VECTORS; part++) sums[set][r][part] += factor * weights[part];
        }
    };
    int64_t i = 0;
    for (; i + SETS <= depth; i += SETS)
        for (int set = 0; set < SETS; set++) {
            for (int line = 0; line < PANEL; line += 16)
                __builtin_prefetch(panel + (i + set + AHEAD) * PANEL + line, 0, 2);
            add(set, i + set);
        }
    for (; i < depth; i++) add(0, i);
    for (int r = 0; r < R; r++)
        for (int part = 0; part < VECTORS; part++) {
            Vector sum = sums[0][r][part];
            for (int set = 1; set < SETS; set++) sum += sums[set][r][part];
            store(y + r * y_stride + part * LANES, sum);
        }
}

// All rows of x times one panel; `bias` has PANEL values.
void multiply_panel(const float* x, int64_t num_rows, int64_t num_inputs, const float* panel, const float* bias,
                    float* y, int64_t y_stride) {
    for (int64_t i = 0; i < num_inputs; i += DEPTH) {
        const int64_t depth = std::min(DEPTH, num_inputs - i);
        for (int64_t r = 0; r < num_rows; r += TILE)
            with_rows(std::min<int64_t>(TILE, num_rows - r), [&](auto rows) {
                float* to = y + r * y_stride;
                multiply<rows.value>(x + r * num_inputs + i, num_inputs, panel + i * PANEL, depth, i ? to : bias,
                                     i ? y_stride : 0, to, y_stride);
            });
    }
}

// Columns of a part of y, [num_rows, width], from the panels in which they were computed one after the other.
void put_panels(const float* panels, int64_t num_rows, int64_t width, float* y, int64_t y_stride) {
    for (int64_t output = 0; output < width; output += PANEL, panels += num_rows * PANEL)
        for (int64_t r = 0; r < num_rows; r++)
            std::memcpy(y + r * y_stride + output, panels + r * PANEL,
                        sizeof(float) * std::min<int64_t>(PANEL, width - output));
}

// Each of the threads calls this, with room for a part in its buffer if the work has states.
void multiply_some(const float* x, int64_t num_rows, int64_t num_inputs, const float* panels, int64_t num_outputs,
                   const float* bias, float* y, Work& work, int num_threads, float* buffer) {
    const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL, grain = grain_of(num_panels, num_threads);
    auto multiply_one = [&](int64_t index, float* to, int64_t stride) {
        const int64_t output = index * PANEL;
        float start[PANEL] = {};
        if (bias) std::memcpy(start, bias + output, sizeof(float) * std::min<int64_t>(PANEL, num_outputs - output));
        multiply_panel(x, num_rows, num_inputs, panels + output * num_inputs, start, to, stride);
    };
    if (work.states)
        return work.share_again(
            num_panels, grain,
            [&](int64_t first, int64_t end) {
                for (int64_t index = first; index < end; index++)
                    multiply_one(index, buffer + (index - first) * num_rows * PANEL, PANEL);
            },
            [&](int64_t first, int64_t end) {
                const int64_t width = std::min(end * PANEL, num_outputs) - first * PANEL;
                put_panels(buffer, num_rows, width, y + first * PANEL, num_outputs);
            });
    std::vector<float> last(num_outputs % PANEL ? num_rows * PANEL : 0);
    work.share(num_panels, grain, [&](int64_t first, int64_t end) {
        for (int64_t index = first; index < end; index++) {
            const int64_t output = index * PANEL, width = num_outputs - output;
            if (width >= PANEL) {
                multiply_one(index, y + output, num_outputs);
                continue;
            }
            multiply_one(index, last.data(), PANEL);
            put_panels(last.data(), num_rows, width, y + output, num_outputs);
        }
    });
}

void multiply_all(const float* x, int64_t num_rows, int64_t num_inputs, const float* panels, int64_t num_outputs,
                  const float* bias, float* y) {
    const int num_threads = num_rows * num_inputs * num_outputs < 1 << 15 ? 1 : omp_get_max_threads();
    Work work;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    multiply_some(x, num_rows, num_inputs, panels, num_outputs, bias, y, work, num_threads, nullptr);
}

// ---- what is done to each row

// y = norm(x + residual) * weight and total = x + residual; without a residual, total is not written.
INLINE void norm_row(const float* x, const float* residual, const float* weight, float* y, float* total, int64_t size,
                     float eps) {
    Vector squares = {};
    if (residual) {
        for (int64_t d = 0; d < size; d += LANES) {
            Vector sum = load(x + d) + load(residual + d);
            store(total + d, sum);
            squares += sum * sum;
        }
        x = total;
    } else {
        for (int64_t d = 0; d < size; d += LANES) squares += load(x + d) * load(x + d);
    }
    const Vector scale = broadcast(1.f / std::sqrt(sum_of(squares) / size + eps));
    for (int64_t d = 0; d < size; d += LANES) store(y + d, load(x + d) * scale * load(weight + d));
}

// Rotates a token's heads, [N, H], in place; cos and sin are [H / 2].
INLINE void rotate_token(float* x, const float* cos, const float* sin, int num_heads, int head_size) {
    const int half = head_size / 2;
    for (int head = 0; head < num_heads; head++) {
        float *first = x + head * head_size, *second = first + half;
        for (int d = 0; d < half; d++) {
            const float a = first[d], b = second[d];
            first[d] = a * cos[d] - b * sin[d];
            second[d] = b * cos[d] + a * sin[d];
        }
    }
}

// y = silu(gate) * up.
INLINE void silu_row(const float* gate, const float* up, float* y, int64_t size) {
    for (int64_t d = 0; d < size; d += LANES) {
        // With e = exp(-|g|), silu(g) is g / (1 + e) above 0 and g e / (1 + e) below: nothing overflows.
        const Vector g = load(gate + d);
        const Vector e = exp2_of_negative((g < 0.f ? g : -g) * LOG2_E);
        store(y + d, g * (g < 0.f ? e : broadcast(1.f)) / (1.f + e) * load(up + d));
    }
}

// Calls `run` for each row, on several threads if there is enough to do.
template <class F>
INLINE void for_rows(int64_t num_rows, int64_t row_size, F run) {
#pragma omp parallel for if (num_rows * row_size > 1 << 15)
    for (int64_t row = 0; row < num_rows; row++) run(row);
}

// ---- sampling
//
// As the Triton kernel in sampling.py: of numbers that are not negative, those with the larger bits are larger, so
// halving the bits between 0 and 1 finds the thresholds of top_k and top_p exactly, ties included.

typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));
typedef double DoubleVector __attribute__((vector_size(8 * LANES)));

constexpr int32_t ABOVE_ONE = 0x3F800001;  // bits of the number after 1
constexpr int64_t CDF_BLOCK = 16 * LANES;

INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The sum of the weights whose bits are `least` or more; the size is a multiple of the lanes.
double mass_of(const float* weights, int64_t size, int32_t least) {
    DoubleVector sums = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const Vector weight = load(weights + i);
        sums += __builtin_convertvector((IntVector)weight >= least ? weight : Vector{}, DoubleVector);
    }
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}

int64_t count_of(const float* weights, int64_t size, int32_t least) {
    IntVector counts = {};
    for (int64_t i = 0; i < size; i += LANES) counts -= (IntVector)load(weights + i) >= least;
    int64_t count = 0;
    for (int lane = 0; lane < LANES; lane++) count += counts[lane];
    return count;
}

// The largest bits, from `low` on, of which `is_enough` says so.
template <class F>
INLINE int32_t halve(int32_t low, F is_enough) {
    for (int32_t high = ABOVE_ONE; high - low > 1;) {
        const int32_t middle = low + (high - low) / 2;
        (is_enough(middle) ? low : high) = middle;
    }
    return low;
}

// The first of the largest logits; -1 if that is not finite, as where any is NaN.
int32_t argmax(const float* logits, int64_t vocab_size) {
    // Comparisons with NaN are false, so a NaN comes in by the second one and stays.
    auto larger = [](auto a, auto b) { return b > a ? b : b == b ? a : b; };
    const int64_t whole = vocab_size / LANES * LANES;
    Vector largest = broadcast(-INFINITE);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector other = load(logits + i);
        largest = larger(largest, other);
    }
    float most = -INFINITE;
    for (int lane = 0; lane < LANES; lane++) most = larger(most, largest[lane]);
    for (int64_t i = whole; i < vocab_size; i++) most = larger(most, logits[i]);
    if (!(std::abs(most) < INFINITE)) return -1;
    return std::find(logits, logits + vocab_size - 1, most) - logits;
}

// `settings` are temperature, top_k, top_p, min_p and a number in [0, 1), `stride` apart; `likeliest` is the first of
// the largest logits. `weights` has room for the row in whole vectors.
int32_t draw_row(const float* logits, int64_t vocab_size, const double* settings, int64_t stride, int32_t likeliest,
                 float* weights) {
    const float temperature = settings[0], min_p = settings[3 * stride];
    const int32_t top_k = settings[stride];
    const double top_p = settings[2 * stride], u = settings[4 * stride];
    if (!(temperature > 0)) return likeliest;

    const int64_t size = (vocab_size + LANES - 1) / LANES * LANES;
    std::memcpy(weights, logits, sizeof(float) * vocab_size);
    std::fill(weights + vocab_size, weights + size, -INFINITE);
    // Subtracted before the division: a tiny temperature then gives minus infinity and not NaN.
    for (int64_t i = 0; i < size; i += LANES)
        store(weights + i, exp2_of_negative((load(weights + i) - logits[likeliest]) / temperature * LOG2_E));
    int32_t kth = 0, lowest = 0;
    if (top_k > 0 && top_k < vocab_size)
        kth = halve(0, [&](int32_t bits) { return count_of(weights, size, bits) >= top_k; });
    if (top_p < 1) {
        const double wanted = top_p * mass_of(weights, size, kth);
        lowest = halve(kth, [&](int32_t bits) { return mass_of(weights, size, bits) >= wanted; });
    }
    const int32_t least = std::max({bits_of(min_p), kth, lowest});  // the most likely token has weight 1

    const double target = u * mass_of(weights, size, least);
    double before = 0, before_block = 0;
    int64_t block = 0;
    for (int64_t first = 0; first < size; first += CDF_BLOCK) {
        const double here = mass_of(weights + first, std::min(CDF_BLOCK, size - first), least);
        if (here > 0) block = first, before_block = before;
        before += here;
        if (before > target) break;
    }
    // The block's own cumulation may round to less than its part of the whole one: then it is the last that adds to it.
    int64_t token = block;
    for (int64_t i = block; i < std::min(block + CDF_BLOCK, size) && before_block <= target; i++)
        if (const double after = before_block + weights[i]; bits_of(weights[i]) >= least && after > before_block)
            token = i, before_block = after;
    return token;
}

// ---- a whole stage
//
// The kernels above one after the other, as models/decoder.py and models/layers.py order them, but by threads that come
// back once a step: a decode of a small model is otherwise mostly the beginning and ending of some ten parallel regions
// a layer.

struct LayerWeights {
    const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm;  // the last two null where heads have no norms
    const float *o, *o_bias, *mlp_norm, *up, *up_bias, *down, *down_bias;
    float *keys, *values;
    int64_t window;
};

struct LayerSizes {
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_size, block_size;
    float eps, scale;
};

// A step as the scheduler sends it, of R requests. Angles are those of positions, [positions, H / 2]. Hidden states
// come from the stage before, [T, D], or else from the embedding. Once it has stored keys and values, the last layer
// goes on with the last token alone of each of `wanted`, [W], unless that is null. Where tokens are pending, [P], which
// of those that the step before sampled come there, 0 if that is null.
struct LayerStep {
    int32_t* token_ids;
    const int32_t *query_lens, *context_lens, *num_blocks, *wanted, *block_tables;
    const int32_t *pending_positions, *pending_samples, *sampled;
    const float *hidden, *cos, *sin;
    int64_t num_tokens, num_requests, num_wanted, num_block_ids, num_pending, num_sampled;
};

// Embedding and head are [V, D], the head in panels. Without a head, as before the last stage, hidden states are the
// result.
struct Vocabulary {
    const float *embedding, *norm, *head;
    int64_t size;
};

// What to compute: all rows must be multiples of the lanes long, and F one of the panel. Without a head, `out` gets the
// hidden states of all tokens, or of those that are wanted, [T or W, D]; with one, the logits of those that are wanted,
// [W, V], `likeliest` the first of each one's largest, or -1 if that is not finite, [W], and `chosen` a token for each:
// one drawn by `settings`, [5, W], see draw in cpu_sampling.py, or where that is null the likeliest, and 0 if there is
// none. Without layers, `out` has logits already.
struct Order {
    const LayerWeights* layers;
    const LayerSizes* sizes;
    const Vocabulary* vocabulary;
    int64_t num_layers;
    LayerStep step;
    float* out;
    const double* settings;
    int32_t *likeliest, *chosen;
};

// As kernels/layers.py has it. Of a step with a fault nothing is computed.
struct Launch {
    Order order;
    int64_t fault;
    std::atomic<int64_t> is_done;
    double begin_s, end_s;
};

enum Fault { NONE, UNKNOWN_TOKEN, WRONG_LENGTHS, NO_MEMORY };  // of a step, as kernels/layers.py has them

// Puts tokens of the step before where they are pending.
Fault put_pending(const LayerStep& step) {
    for (int64_t i = 0; i < step.num_pending; i++) {
        const int64_t position = step.pending_positions[i], sample = step.pending_samples[i];
        if (position < 0 || position >= step.num_tokens) return WRONG_LENGTHS;
        if (step.sampled && (sample < 0 || sample >= step.num_sampled)) return WRONG_LENGTHS;
        step.token_ids[position] = step.sampled ? step.sampled[sample] : 0;
    }
    return NONE;
}

Fault find_fault(const LayerStep& step, int64_t vocab_size, int64_t block_size) {
    int64_t num_tokens = 0, num_block_ids = 0;
    for (int request = 0; request < step.num_requests; request++) {
        const int64_t query_len = step.query_lens[request], context_len = step.context_lens[request];
        const int64_t num_blocks = step.num_blocks[request];
        if (query_len < 1 || context_len < 0 || context_len + query_len > num_blocks * block_size) return WRONG_LENGTHS;
        num_tokens += query_len;
        num_block_ids += num_blocks;
    }
    if (num_tokens != step.num_tokens || num_block_ids != step.num_block_ids) return WRONG_LENGTHS;
    if (step.wanted && step.num_wanted > step.num_requests) return WRONG_LENGTHS;
    for (int index = 0; index < step.num_wanted; index++)
        if (step.wanted && (step.wanted[index] < 0 || step.wanted[index] >= step.num_requests)) return WRONG_LENGTHS;
    for (int64_t i = 0; i < num_tokens; i++)
        if (!step.hidden && (step.token_ids[i] < 0 || step.token_ids[i] >= vocab_size)) return UNKNOWN_TOKEN;
    return NONE;
}

// Where the step's tokens are.
struct Layout {
    std::vector<Query> queries, wanted_queries;
    std::vector<int32_t> positions, slots, wanted_tokens;
    std::vector<int32_t> new_blocks;  // those whose first slot is written
    std::vector<int32_t> block_tables;

    Layout(const LayerStep& step, int block_size)
        : block_tables(step.block_tables, step.block_tables + step.num_block_ids) {
        const int32_t* blocks = block_tables.data();
        for (int request = 0; request < step.num_requests; request++) {
            const int first = positions.size(), num_tokens = step.query_lens[request];
            const int context_len = step.context_lens[request];
            queries.push_back({first, first, num_tokens, context_len, blocks});
            for (int position = context_len; position < context_len + num_tokens; position++) {
                const int32_t block = blocks[position / block_size], offset = position % block_size;
                positions.push_back(position);
                slots.push_back(block * block_size + offset);
                if (!offset) new_blocks.push_back(block);
            }
            blocks += step.num_blocks[request];
        }
        for (int index = 0; step.wanted && index < step.num_wanted; index++) {
            const Query& query = queries[step.wanted[index]];
            const int before = query.num_tokens - 1, token = query.first_token + before;
            wanted_queries.push_back({token, index, 1, query.context_len + before, query.blocks});
            wanted_tokens.push_back(token);
        }
    }
};

constexpr int PHASES = 8;  // of a layer: each begins when the one before is done
constexpr int LONG_PHASES[] = {1, 3, 4, 6, 7};  // products and attention: others are short
constexpr int64_t GATED_ROWS = 8 * TILE;

struct Scratch {
    float *hidden, *wanted, *x, *qkv, *attention, *delta, *activated;

    Scratch(float* from, const LayerSizes& sizes, int64_t num_tokens) {
        const int64_t heads = sizes.num_heads * sizes.head_size, kv = sizes.num_kv_heads * sizes.head_size;
        hidden = from;
        wanted = hidden + num_tokens * sizes.hidden_size;
        x = wanted + num_tokens * sizes.hidden_size;
        delta = x + num_tokens * sizes.hidden_size;
        qkv = delta + num_tokens * sizes.hidden_size;
        attention = qkv + num_tokens * (heads + 2 * kv);
        activated = attention + num_tokens * heads;
    }

    static int64_t size_each(const LayerSizes& sizes) {
        const int64_t heads = sizes.num_heads * sizes.head_size, kv = sizes.num_kv_heads * sizes.head_size;
        return 4 * sizes.hidden_size + 2 * heads + 2 * kv + sizes.intermediate_size;
    }
};

// silu(gate) * up, PANEL of F outputs from `output` on, of all rows; `panels` has those of gate and those of up one
// after the other. So many rows at a time that both are still in the L1 cache when SiLU reads them.
void gate_panel(const float* x, int64_t num_rows, int64_t num_inputs, const float* panels, const float* bias,
                int64_t output, int64_t F, float* activated, int64_t stride, float* buffer) {
    float start[2][PANEL] = {};
    for (int half = 0; bias && half < 2; half++)
        std::memcpy(start[half], bias + half * F + output, sizeof start[half]);
    for (int64_t first = 0; first < num_rows; first += GATED_ROWS) {
        const int64_t count = std::min(GATED_ROWS, num_rows - first);
        for (int half = 0; half < 2; half++)
            multiply_panel(x + first * num_inputs, count, num_inputs, panels + (half * F + output) * num_inputs,
                           start[half], buffer + half * PANEL, 2 * PANEL);
        for (int64_t i = 0; i < count; i++) {
            const float* gate = buffer + i * 2 * PANEL;
            silu_row(gate, gate + PANEL, activated + (first + i) * stride, PANEL);
        }
    }
}

// Each of the threads calls this. With `some` it goes on with the wanted tokens alone, whose hidden states are then in
// scratch.wanted, and `tasks` are of those.
void run_layer(const LayerWeights& weights, const LayerSizes& sizes, const LayerStep& step, const float* embedding,
               const Layout& layout, const std::vector<Task>& tasks, bool some, const Scratch& scratch, bool is_first,
               int num_threads, Work* phase, float* buffer) {
    const int64_t D = sizes.hidden_size, F = sizes.intermediate_size, H = sizes.head_size, T = layout.positions.size();
    const int64_t heads = sizes.num_heads * H, kv = sizes.num_kv_heads * H, row_size = heads + 2 * kv;
    const int64_t num_rows = some ? step.num_wanted : T;
    float *hidden = scratch.hidden, *out = some ? scratch.wanted : hidden;
    auto for_each = [&](int64_t count, auto run) {
        phase++->share(count, grain_of(count, num_threads), [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; i++) run(i);
        });
    };
    auto multiply = [&](const float* x, int64_t rows, int64_t inputs, const float* panels, int64_t outputs,
                        const float* bias, float* y) {
        multiply_some(x, rows, inputs, panels, outputs, bias, y, *phase++, num_threads, buffer);
    };

    for_each(T + layout.new_blocks.size(), [&](int64_t i) {
        float *row = hidden + i * D, *delta = scratch.delta + i * D, *x = scratch.x + i * D;
        if (i < T && is_first) {
            const float* from = step.hidden ? step.hidden + i * D : embedding + step.token_ids[i] * D;
            std::memcpy(row, from, sizeof(float) * D);
            return norm_row(row, nullptr, weights.input_norm, x, nullptr, D, sizes.eps);
        }
        if (i < T) return norm_row(delta, row, weights.input_norm, x, row, D, sizes.eps);
        for (float* pool : {weights.keys, weights.values})
            clear_block(pool, layout.new_blocks[i - T], kv * sizes.block_size);
    });
    multiply(scratch.x, T, D, weights.qkv, row_size, weights.qkv_bias, scratch.qkv);
    for_each(T, [&](int64_t token) {
        float* row = scratch.qkv + token * row_size;
        const int64_t angle = layout.positions[token] * H / 2;
        for (int64_t head = 0; weights.q_norm && head < sizes.num_heads + sizes.num_kv_heads; head++) {
            const float* norm = head < sizes.num_heads ? weights.q_norm : weights.k_norm;
            norm_row(row + head * H, nullptr, norm, row + head * H, nullptr, H, sizes.eps);
        }
        rotate_token(row, step.cos + angle, step.sin + angle, sizes.num_heads + sizes.num_kv_heads, H);
        write_token(row + heads, row + heads + kv, weights.keys, weights.values, layout.slots[token],
                    sizes.num_kv_heads, H, sizes.block_size);
    });
    const Step attention = {scratch.qkv, row_size, scratch.attention, (int)sizes.num_heads, sizes.scale,
                            (int)weights.window};
    const Cache cache = {weights.keys, weights.values, (int)sizes.num_kv_heads, (int)H, (int)sizes.block_size};
    attend_some<float>(attention, cache, tasks, *phase++, buffer);
    multiply(scratch.attention, num_rows, heads, weights.o, D, weights.o_bias, scratch.delta);
    for_each(num_rows, [&](int64_t i) {
        const int64_t token = some ? layout.wanted_tokens[i] : i;
        norm_row(scratch.delta + i * D, hidden + token * D, weights.mlp_norm, scratch.x + i * D, out + i * D, D,
                 sizes.eps);
    });
    const int64_t grain = grain_of(F / PANEL, num_threads);
    auto gate = [&](int64_t index, float* to, int64_t stride) {
        gate_panel(scratch.x, num_rows, D, weights.up, weights.up_bias, index * PANEL, F, to, stride, buffer);
    };
    Work& gating = *phase++;
    if (gating.states) {
        float* panels = buffer + GATED_ROWS * 2 * PANEL;
        gating.share_again(
            F / PANEL, grain,
            [&](int64_t first, int64_t end) {
                for (int64_t index = first; index < end; index++)
                    gate(index, panels + (index - first) * num_rows * PANEL, PANEL);
            },
            [&](int64_t first, int64_t end) {
                put_panels(panels, num_rows, (end - first) * PANEL, scratch.activated + first * PANEL, F);
            });
    } else {
        gating.share(F / PANEL, grain, [&](int64_t first, int64_t end) {
            for (int64_t index = first; index < end; index++) gate(index, scratch.activated + index * PANEL, F);
        });
    }
    multiply(scratch.activated, num_rows, F, weights.down, D, weights.down_bias, scratch.delta);
}

// A step that the threads of a stream are at. One that has lost its core may still be in it when the others have done
// all of it, and the next step too: it then finds nothing left to do, what it was doing comes to nothing, and all that
// it may read meanwhile is the run's own or the stage's.
struct Run {
    Run(const Order& order, int num_threads, std::shared_ptr<float[]> scratch_memory)
        : order(order),
          sizes(*order.sizes),
          vocabulary(*order.vocabulary),
          num_threads(num_threads),
          layout(order.step, sizes.block_size),
          num_tokens(layout.positions.size()),
          num_rows(order.step.wanted || !order.num_layers ? order.step.num_wanted : num_tokens),
          scratch_memory(std::move(scratch_memory)),
          scratch(this->scratch_memory.get(), sizes, num_tokens),
          all_tasks(make_tasks(layout.queries, sizes.num_heads, sizes.num_kv_heads)),
          wanted_tasks(make_tasks(layout.wanted_queries, sizes.num_heads, sizes.num_kv_heads)),
          phases(order.num_layers * PHASES) {
        if (num_threads == 1 || num_tokens > AGAIN_TOKENS) return;
        const int64_t most = std::max({sizes.intermediate_size, row_size(), sizes.hidden_size}) / PANEL + 1;
        const int64_t num_parts = std::max<int64_t>(most, all_tasks.size());
        const int64_t num_states = order.num_layers * std::size(LONG_PHASES) * num_parts;
        states.reset(new std::atomic<uint8_t>[num_states + vocabulary.size / PANEL + 1]());
        std::atomic<uint8_t>* next = states.get();
        for (int64_t layer = 0; layer < order.num_layers; layer++)
            for (int phase : LONG_PHASES) phases[layer * PHASES + phase].states = next, next += num_parts;
        logits.states = next;
    }

    // Each of the threads calls this, the first one before the step is done, the others whenever they come to it.
    void work() {
        if (!order.num_layers) return choose();
        const LayerStep& step = order.step;
        const int64_t D = sizes.hidden_size, V = vocabulary.size;
        const int64_t most = std::max({V, sizes.intermediate_size, row_size(), D}) / PANEL + 1;
        const int64_t part = states ? num_tokens * grain_of(most, num_threads) * PANEL : 0;
        const int64_t size = std::max(buffer_size(sizes.head_size), GATED_ROWS * 2 * PANEL) + part;
        const std::unique_ptr<float[]> buffer(new float[size]);
        for (int64_t layer = 0; layer < order.num_layers; layer++) {
            const bool some = step.wanted && layer == order.num_layers - 1;
            run_layer(order.layers[layer], sizes, step, vocabulary.embedding, layout,
                      some ? wanted_tasks : all_tasks, some, scratch, layer == 0, num_threads, &phases[layer * PHASES],
                      buffer.get());
        }
        float *hidden = step.wanted ? scratch.wanted : scratch.hidden, *out = order.out;
        sum.share(num_rows, grain_of(num_rows, num_threads), [&](int64_t first, int64_t end) {
            for (int64_t i = first * D; i < end * D; i += D)
                if (vocabulary.head)
                    norm_row(scratch.delta + i, hidden + i, vocabulary.norm, scratch.x + i, hidden + i, D, sizes.eps);
                else
                    for (int64_t d = i; d < i + D; d++) out[d] = hidden[d] + scratch.delta[d];
        });
        if (vocabulary.head) {
            multiply_some(scratch.x, num_rows, D, vocabulary.head, V, nullptr, out, logits, num_threads, buffer.get());
            choose();
        }
    }

    void choose() {
        const int64_t V = vocabulary.size;
        const float* out = order.out;
        // Not even mapped where no row needs it.
        const std::unique_ptr<float[]> weights(order.settings ? new float[V + LANES] : nullptr);
        choice.share(num_rows, 1, [&](int64_t row, int64_t) {
            const int32_t likeliest = order.likeliest[row] = argmax(out + row * V, V);
            order.chosen[row] = std::max(0, likeliest);
            if (!order.settings || likeliest < 0) return;
            order.chosen[row] = draw_row(out + row * V, V, order.settings + row, num_rows, likeliest, weights.get());
        });
    }

  private:
    // With more, putting parts in their places would take too long.
    static constexpr int64_t AGAIN_TOKENS = 64;

    int64_t row_size() const { return (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_size; }

    const Order order;
    const LayerSizes sizes;
    const Vocabulary vocabulary;
    const int num_threads;
    const Layout layout;
    const int64_t num_tokens, num_rows;
    const std::shared_ptr<float[]> scratch_memory;
    const Scratch scratch;
    const std::vector<Task> all_tasks, wanted_tasks;
    std::vector<Work> phases;
    Work sum, logits, choice;
    std::unique_ptr<std::atomic<uint8_t>[]> states;
};

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Threads that compute steps one after the other: each begins when the one before ends, and waits for nobody's Python.
class Stream {
  public:
    Stream(int num_threads, int ended_fd) : num_threads(num_threads), ended_fd(ended_fd) {
        threads.emplace_back([this] { lead(); });
        for (int i = 1; i < num_threads; i++) threads.emplace_back([this] { help(); });
    }

    // Returns when what was launched is done and the threads have ended.
    void close() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            is_closed = true;
        }
        launched.notify_one();
        for (std::thread& thread : threads) thread.join();
        current.reset();
        scratch.reset();
    }

    void launch(Launch* step) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            steps.push_back(step);
        }
        launched.notify_one();
    }

    void wait(const Launch* step) {
        std::unique_lock<std::mutex> lock(mutex);
        ended.wait(lock, [&] { return step->is_done != 0; });
    }

  private:
    static constexpr int SPINS = 1024;  // some 30 us, as the next step is mostly there when one ends

    void lead() {
        unbind();
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            launched.wait(lock, [&] { return is_closed || !steps.empty(); });
            if (steps.empty()) break;
            Launch* step = steps.front();
            steps.pop_front();
            lock.unlock();
            step->begin_s = now_s();
            try {
                step->fault = compute(step->order);
            } catch (const std::bad_alloc&) {
                step->fault = NO_MEMORY;
            }
            step->end_s = now_s();
            lock.lock();
            step->is_done = 1;
            ended.notify_all();
            lock.unlock();  // or who hears of it would wait for the lock
            tell();
            lock.lock();
        }
        has_ended = true;
        begun.notify_all();
    }

    void tell() {
#ifdef __linux__
        if (ended_fd < 0) return;
        const uint64_t one = 1;
        // Fails only where the counter is full, and then whoever listens has been told.
        [[maybe_unused]] const ssize_t written = write(ended_fd, &one, sizeof one);
#endif
    }

    Fault compute(const Order& order) {
        if (const Fault fault = put_pending(order.step)) return fault;
        if (const Fault fault = find_fault(order.step, order.vocabulary->size, order.sizes->block_size)) return fault;
        const int64_t num_scratch = order.step.num_tokens * Scratch::size_each(*order.sizes);
        if (scratch_size < num_scratch) {
            // Kept: memory that is new in each step is mapped anew, which takes longer than a decode.
            scratch.reset(new float[num_scratch]);
            scratch_size = num_scratch;
        }
        const auto run = std::make_shared<Run>(order, num_threads, scratch);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            current = run;
            num_begun++;
        }
        begun.notify_all();
        run->work();
        return NONE;
    }

    // A process that gives way to others, as Ray's workers do, has an event loop and an ingress beside it: this thread
    // then takes a core only where nobody else wants it, as another one computes what it was computing if need be.
    void help() {
        unbind();
#ifdef __linux__
        const sched_param none = {};
        if (getpriority(PRIO_PROCESS, 0) > 0) sched_setscheduler(0, SCHED_IDLE, &none);
#endif
        for (int64_t last = 0;;) {
            for (int spins = 0; spins < SPINS && num_begun == last; spins++) relax();
            std::shared_ptr<Run> run;
            {
                std::unique_lock<std::mutex> lock(mutex);
                begun.wait(lock, [&] { return has_ended || num_begun != last; });
                if (has_ended) return;
                run = current;
                last = num_begun;
            }
            try {
                run->work();
            } catch (const std::bad_alloc&) {  // before it has taken a part; the others will
            }
        }
    }

    // OpenMP binds the thread that begins it to a core if told to (OMP_PROC_BIND), and so all that this one begins.
    static void unbind() {
#ifdef __linux__
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        for (int place = 0; place < omp_get_num_places(); place++) {
            std::vector<int> ids(omp_get_place_num_procs(place));
            omp_get_place_proc_ids(place, ids.data());
            for (int id : ids) CPU_SET(id, &cpus);
        }
        if (CPU_COUNT(&cpus)) sched_setaffinity(0, sizeof cpus, &cpus);
#endif
    }

    const int num_threads, ended_fd;
    std::mutex mutex;
    std::condition_variable launched, begun, ended;
    std::deque<Launch*> steps;
    std::shared_ptr<Run> current;
    std::atomic<int64_t> num_begun{0};
    std::shared_ptr<float[]> scratch;
    int64_t scratch_size = 0;
    bool is_closed = false, has_ended = false;
    std::vector<std::thread> threads;
};

}  // namespace

extern "C" {

// Changes with what follows, structs included, so that nobody takes a build of another version: see native.py.
int sarathi_abi() { return 4; }

// Sizes of rows must be multiples of this.
int sarathi_lanes() { return LANES; }

// Outputs of a panel of `sarathi_linear`.
int sarathi_panel() { return PANEL; }

// q is [T, N, H] and out [T, N, H] float32, the former with q_stride elements between tokens. The pools hold float32 or
// bfloat16. cu_query_lens is [R + 1], seq_lens [R], window 0 for none.
void sarathi_attention(const float* q, int64_t q_stride, const void* keys, const void* values, int is_bfloat16,
                       float* out, const int32_t* cu_query_lens, const int32_t* seq_lens, const int32_t* block_tables,
                       int64_t table_stride, int num_requests, int num_heads, int num_kv_heads, int head_size,
                       int block_size, float scale, int window) {
    const Step step = {q, q_stride, out, num_heads, scale, window};
    const Cache cache = {keys, values, num_kv_heads, head_size, block_size};
    std::vector<Query> queries;
    for (int request = 0; request < num_requests; request++) {
        const int first = cu_query_lens[request], num_tokens = cu_query_lens[request + 1] - first;
        queries.push_back(
            {first, first, num_tokens, seq_lens[request] - num_tokens, block_tables + request * table_stride});
    }
    const auto tasks = make_tasks(queries, num_heads, num_kv_heads);
    if (is_bfloat16)
        attend_all<bfloat16>(step, cache, tasks);
    else
        attend_all<float>(step, cache, tasks);
}

// k and v are [T, K, H] with k_stride and v_stride elements between tokens, of the pools' type.
void sarathi_write_kv(const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* keys, void* values,
                      int is_bfloat16, const int32_t* slots, int64_t num_tokens, const int32_t* new_blocks,
                      int64_t num_new_blocks, int num_kv_heads, int head_size, int block_size) {
    auto write = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        write_all<T>(static_cast<const T*>(k), k_stride, static_cast<const T*>(v), v_stride, static_cast<T*>(keys),
                     static_cast<T*>(values), slots, num_tokens, new_blocks, num_new_blocks, num_kv_heads, head_size,
                     block_size);
    };
    if (is_bfloat16)
        write(static_cast<bfloat16*>(nullptr));
    else
        write(static_cast<float*>(nullptr));
}

// x is [T, I] and y [T, O] float32, bias [O] or null; for the panels see above.
void sarathi_linear(const float* x, int64_t num_rows, int64_t num_inputs, const float* panels, int64_t num_outputs,
                    const float* bias, float* y) {
    multiply_all(x, num_rows, num_inputs, panels, num_outputs, bias, y);
}

// y = norm(x + residual) * weight and total = x + residual, all [T, D] float32, D a multiple of the lanes. Without a residual,
// total is not written.
void sarathi_rms_norm(const float* x, const float* residual, const float* weight, float* y, float* total,
                      int64_t num_rows, int64_t size, float eps) {
    for_rows(num_rows, size, [=](int64_t row) {
        const int64_t at = row * size;
        norm_row(x + at, residual ? residual + at : nullptr, weight, y + at, residual ? total + at : nullptr, size, eps);
    });
}

// Rotates x, [T, N, H] float32 with x_stride elements between tokens, in place; cos and sin are [T, H / 2].
void sarathi_rotary(float* x, int64_t x_stride, const float* cos, const float* sin, int64_t num_tokens, int num_heads,
                    int head_size) {
    const int half = head_size / 2;
    for_rows(num_tokens, (int64_t)num_heads * head_size, [=](int64_t token) {
        rotate_token(x + token * x_stride, cos + token * half, sin + token * half, num_heads, head_size);
    });
}

// y = silu(gate) * up, [T, F] float32, of gate and up side by side, [T, 2 F]; F is a multiple of the lanes.
void sarathi_silu_mul(const float* gate_up, float* y, int64_t num_rows, int64_t size) {
    for_rows(num_rows, size, [=](int64_t row) {
        const float* gate = gate_up + row * 2 * size;
        silu_row(gate, gate + size, y + row * size, size);
    });
}

// A token for each row of logits, [n, V] float32, by settings [5, n]; see draw in cpu_sampling.py.
void sarathi_draw(const float* logits, int64_t num_rows, int64_t vocab_size, const double* settings,
                  int32_t* token_ids) {
    Work work;
#pragma omp parallel if (num_rows > 1 && num_rows * vocab_size > 1 << 15)
    {
        const std::unique_ptr<float[]> weights(new float[vocab_size + LANES]);  // not even mapped for greedy rows
        work.share(num_rows, 1, [&](int64_t row, int64_t) {
            const float* of_row = logits + row * vocab_size;
            const int32_t likeliest = std::max(0, argmax(of_row, vocab_size));
            token_ids[row] = draw_row(of_row, vocab_size, settings + row, num_rows, likeliest, weights.get());
        });
    }
}

// After each step 1 is added to the counter `ended_fd`, see eventfd(2); -1 for none.
void* sarathi_open_stream(int num_threads, int ended_fd) { return new Stream(num_threads, ended_fd); }

// It stays in memory, some hundred bytes, as somebody may be in `sarathi_wait` when a process ends.
void sarathi_close_stream(void* stream) { static_cast<Stream*>(stream)->close(); }

// The step must stay where it is until it is done.
void sarathi_launch(void* stream, Launch* step) { static_cast<Stream*>(stream)->launch(step); }

void sarathi_wait(void* stream, const Launch* step) { static_cast<Stream*>(stream)->wait(step); }
}
