/* SPDX-License-Identifier: Apache-2.0
 * metrics.h - figures of a run: one value per step, summarised at the end; and the same step under perfect balance. */
#ifndef METRICS_H
#define METRICS_H

#include "graph.h"
#include "machine.h"

/* One row per figure: name, unit, what it is. The single list behind results, `moelab plugins` and the manual. */
#define METRICS(M)                                                                                                    \
    M(step_s, "s", "time of one step")                                                                                \
    M(bound_s, "s", "the same step if its work and traffic were spread evenly over devices and links, nothing loaded")\
    M(over_bound, "", "step_s / bound_s")                                                                             \
    M(tokens_per_s, "token/s", "tokens of a step / step_s")                                                           \
    M(a2a_s, "s", "time in which tokens or their outputs were on their way")                                          \
    M(dispatch_s, "s", "time in which tokens were on their way to experts")                                           \
    M(combine_s, "s", "time in which experts' outputs were on their way back")                                        \
    M(experts_s, "s", "time of the slowest device's expert FFNs, summed over layers")                                 \
    M(attention_s, "s", "time of the slowest device's attention, summed over layers")                                 \
    M(gate_s, "s", "time of the slowest device's gate, summed over layers")                                           \
    M(permute_s, "s", "time of the slowest device's putting rows in order for sending, summed over layers")           \
    M(shared_s, "s", "time of the slowest device's shared experts, summed over layers")                               \
    M(unpermute_s, "s", "time of the slowest device's adding up of outputs, summed over layers")                      \
    M(other_s, "s", "time of the slowest device's dense FFNs, embedding, head and optimiser, summed over layers")     \
    M(collective_s, "s", "time in which partial sums or gradients of what devices share were on their way")           \
    M(decide_s, "s", "time before the step in which policies decided and it was laid out, where times are real")      \
    M(queue_s, "s", "time that the host took to queue a step on a GPU")                                                \
    M(padding, "", "share of the rows that experts computed which mean nothing, where CUDA graphs pad them")          \
    M(load_s, "s", "time that expert weights were on their way, summed over the busiest device's loads")              \
    M(migration_s, "s", "time in which weights moved to their new devices")                                           \
    M(imbalance, "", "largest / mean rows computed per device, mean over layers")                                     \
    M(max_vio, "", "largest / mean tokens per expert - 1, mean over layers")                                          \
    M(max_vio_global, "", "the same of the loads of all steps added up, mean over layers; one value, after the last") \
    M(load_cv, "", "coefficient of variation of experts' tokens, mean over layers")                                   \
    M(load_gini, "", "Gini coefficient of experts' tokens, mean over layers; 0 where all have as many")               \
    M(load_entropy, "", "entropy of experts' shares of tokens / ln(experts), mean over layers; 1 where all are equal")\
    M(fluctuation, "", "half the sum of changes of experts' shares of tokens since the step before, mean over layers")\
    M(routes, "", "(token, expert) pairs that the router chose, summed over layers")                                  \
    M(dropped, "", "share of those that a balancer took away")                                                        \
    M(added, "", "pairs that a balancer added / pairs that the router chose")                                         \
    M(experts_per_token, "", "experts that compute a token, mean over layers; those that cost nothing left out")      \
    M(skipped, "", "share of halves of layers that tokens leave out, where the router has them do so")                \
    M(agreement, "", "share of the router's choices that are among the K highest logits, where there are logits")     \
    M(task_loss, "", "of a gate that is trained: squared error / mean square of the target, mean over layers")        \
    M(aux_loss, "", "of a gate that is trained: losses of balancers, mean over layers")                               \
    M(flops_per_token, "FLOP", "of experts, shared experts, gate, router and balancers, per token, summed over layers")\
    M(intra_node_bytes, "B", "bytes exchanged between devices of one node")                                           \
    M(inter_node_bytes, "B", "bytes exchanged between nodes")                                                         \
    M(accesses, "", "expert accesses: one per device, layer and expert with rows")                                    \
    M(hit_rate, "", "share of expert accesses that found the weights resident; an expert's first is a miss and counts")\
    M(loaded_bytes, "B", "expert weights loaded")                                                                     \
    M(energy_j, "J", "energy of devices, links and nodes, of machines whose file says what theirs are")               \
    M(j_per_token, "J/token", "energy_j / tokens of a step")

enum metric {
#define METRIC_ID(name, unit, help) METRIC_##name,
    METRICS(METRIC_ID)
#undef METRIC_ID
        N_METRICS
};

struct metric_info { const char *name, *unit, *help; };
extern const struct metric_info metric_info[N_METRICS];

/* Of the layers of one step: routing_metrics.c. */
struct routing_sums {
    double max_vio, cv, gini, entropy, fluctuation, flops;
    double max_vio_global;           /* of all steps so far, after the last layer */
    int32_t n_layers, n_fluctuation; /* layers that were added up */
    int64_t tokens, chosen, dropped, added, computed; /* layers' tokens; pairs */
    int64_t left_out;                /* halves of layers, two to a token */
    bool skips;                      /* a router has had tokens leave out halves */
    int64_t compared, agreed;        /* choices where there are logits; those among the K highest */
};

struct metrics {
    double *value[N_METRICS]; /* [n_steps], NaN where a figure does not apply */
    double spread[N_METRICS]; /* between quartiles of what was measured several times / its median, summed over steps */
    int32_t n_steps, room, n_spread; /* n_spread: steps that were */
    /* added up by the stages while a step is built */
    double imbalance_sum;
    struct routing_sums routing;
    int64_t accesses, hits;
    double loaded_bytes;
    bool learns;     /* a gate is trained, with these losses: gate_stage.c */
    double task_loss, aux_loss;
    double decide_s; /* of this step; 0: it is not told */
    double queue_s, padding; /* of what ran last; below 0: not told */
};

void metrics_free(struct metrics *);
/* Reads a graph that has run: one more step, or the same once more. joules 0: not known. */
int metrics_step(struct metrics *, const struct moe_graph *, const struct topology *, int32_t n_tokens,
                 double seconds, double joules, struct err *);
/* After metrics_step(): the step is over. n > 0: it was run n + 1 times, of which the first does not count; of the
 * others' figures the medians stay. */
int metrics_end_step(struct metrics *, int32_t n, struct err *);
/* {"step_s": {"mean":..., "p50":..., "p99":..., "min":..., "max":...}, ...}; figures that never applied left out. Of
 * what was measured several times also "spread". */
json_t *metrics_json(const struct metrics *);

/* Longest path through the graph if no device had more of a (layer, op) than the mean of all, and
 * the bytes of every exchange lay evenly on links of one role (links whose names differ only by numbers), with nothing
 * loaded, no latency and no start-up. Never above the time of the run it is computed from, whatever the layout. */
int metrics_bound(const struct moe_graph *, const struct topology *, double *seconds, struct err *);

#endif
