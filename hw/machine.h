/* SPDX-License-Identifier: Apache-2.0
 * machine.h - the seam between decisions and time.
 *
 *   topology    what the hardware is: devices, links, routes (from hw/machines/NAME.lua, as JSON)
 *   compute     how long a piece of work takes on one device (roofline)
 *   net         how long transfers take that share links: flow.c, simgrid_client.c
 *   sim         runs a task graph on compute + net under a virtual clock
 *   host, cuda  run the same task graph for real
 *
 * Nothing here knows a policy. SI units: seconds, bytes, FLOP/s. */
#ifndef MACHINE_H
#define MACHINE_H

#include "err.h"
#include "moelab.h"
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>

/* ---- topology ---- */

enum precision { PREC_FP32, PREC_TF32, PREC_BF16, PREC_FP8, PREC_INT8, PREC_INT4, PREC_FP16, N_PRECISIONS };
extern const char *const precision_name[N_PRECISIONS]; /* "fp32", ... */

struct device_spec {
    char name[64];
    double memory;              /* bytes */
    double mem_bandwidth;       /* B/s */
    double peak[N_PRECISIONS];  /* FLOP/s, dense; 0: not supported, and computing takes for ever */
    double launch_s;            /* fixed cost of one kernel */
    double flops_efficiency;    /* of peak, reached by a large GEMM */
    double mem_efficiency;      /* of mem_bandwidth, reached by a large copy */
    double read_efficiency;     /* the same by attention's core, whose arithmetic adds to that; 0: mem_efficiency */
    double decode_efficiency;   /* of peak, by the core's arithmetic when decoding; 0: flops_efficiency */
    double combine_efficiency;  /* and by sums of rows that lie apart; 0: mem_efficiency */
    struct {                    /* grouped GEMMs: gemm.c */
        double sms;             /* tiles at once */
        double tile_m;          /* rows of a tile 16 wide; 0: tiles as DeepGEMM chooses them */
        double rest;            /* of a tile's time, each half that rows which fill none come in; 0: they take a tile */
        double mma_efficiency;  /* of peak, in the main loop of a tile */
        double port_bandwidth;  /* B/s that one SM draws operands from L2 with */
        double store_bandwidth; /* B/s that one SM's results leave with */
        double mem_efficiency;  /* of mem_bandwidth */
        double vector_efficiency; /* of mem_bandwidth, by products of one row where those are others; 0: they are not */
        double launch_s;
        double overlap;         /* of tiles and memory: exponent, INFINITY hides one behind the other */
    } gemm;
    struct latency_table *tables; /* products that were timed go before gemm.c's model; or NULL. The topology's */
};

struct link { char name[64]; double bandwidth; double latency; };

/* What an exchange costs beside its bytes and the links' latency. */
struct exchange_costs {
    double startup;          /* s per exchange: launch, packing, flags, polling */
    double per_peer;         /* s for each other device that a device sends to */
    double per_message;      /* s that a sender is busy with each message, links or not */
    double message_overhead; /* bytes on the links beside each message */
    double collective_sms;   /* that an exchange of the core's own takes from computing; a policy's says itself */
};

/* Up to 12 (PCIe and its uplink, a NIC, two links up a fat tree, and the same down), more in imported platforms. */
#define TOPOLOGY_MAX_HOPS 32

/* From `at` on, in seconds of the machine's clock, a link has another bandwidth; 0: it has failed. */
struct link_change { double at; int32_t link; double bandwidth; };

/* From `at` on, a device takes `factor` times as long to compute; INFINITY: it has failed, and its links with it. */
struct slow_change { double at; int32_t device; double factor; };

/* Endpoints: device d is d; the memory of node n is D + n; its SSD is D + N + n. */
struct topology {
    char name[64];
    int32_t n_devices, n_nodes;
    int32_t *node;               /* [D] of each device */
    int32_t *first_device;       /* [N + 1] of each node: nodes may differ */
    struct device_spec *device;  /* [D] */
    struct exchange_costs exchange;
    double pace;                 /* what devices compute, and exchange over nvlink, takes so many times as long */
    double probe_s;              /* of machine host's probe as it was calibrated, undisturbed; 0: not known */
    int32_t n_links;
    struct link *link;           /* one direction each; shared by every route over it */
    int32_t n_changes;
    struct link_change *change;  /* [n_changes] in order of (at, link) */
    int32_t n_slow;
    struct slow_change *slow;    /* [n_slow] in order of (device, at) */
    double *host_memory, *host_mem_bandwidth, *host_flops; /* [N] */
    bool *unified;               /* [N] host memory is the device's: what one holds, the other lacks */
    struct latency_table *tables; /* or NULL */
    struct energy_figures *energy; /* or NULL: nobody knows */
    struct platform *platform;   /* links and routes that are written down one by one; or NULL */
    void *priv;                  /* what topology_route.c needs to answer routes */
    /* [D] links to other nodes and back, with their latency, where there is nothing between the NICs, and nothing
     * between them and their devices; else NULL. */
    struct direct_links { int32_t out, in; double out_latency, in_latency; } *direct;
    json_t *description;         /* as written, defaults filled in: for the manifest */
};

/* A description as loaded from a machine file, `nodes` already applied. Unknown keys, missing links (several nodes
 * and no NIC; several devices and neither NVLink nor PCIe), figures without a source or a unit, and sizes that are
 * not positive are errors that name `file` and the key. */
int topology_build(struct topology **, const json_t *description, const char *file, struct err *);
void topology_free(struct topology *);
/* Links from src to dst in order; path: 0 as the network chooses, p the p-th of several. Returns their number, 0 for
 * src == dst, < 0 if there is no way. Cheap: called per flow. latency (may be NULL): the sum, in seconds. */
int topology_route_any(const struct topology *, int32_t src, int32_t dst, int32_t path,
                       int32_t link[TOPOLOGY_MAX_HOPS], double *latency);
static inline int topology_route(const struct topology *t, int32_t src, int32_t dst, int32_t path,
                                 int32_t link[TOPOLOGY_MAX_HOPS], double *latency)
{
    if (!t->direct || src >= t->n_devices || dst >= t->n_devices || t->node[src] == t->node[dst])
        return topology_route_any(t, src, dst, path, link, latency);
    link[0] = t->direct[src].out; /* by far the most frequent, and looked at for every part of every exchange */
    link[1] = t->direct[dst].in;
    if (latency)
        *latency = t->direct[src].out_latency + t->direct[dst].in_latency;
    return 2;
}
/* Parallel ways between two endpoints, `path` of topology_route counts from 1 to here; 0: there is none. */
int32_t topology_paths(const struct topology *, int32_t src, int32_t dst);
/* Links that a copy crosses which a kernel pushes through its own device's port to the NVLink switch; 0: none. */
int topology_loop(const struct topology *, int32_t device, int32_t link[TOPOLOGY_MAX_HOPS]);
/* When a piece of work that takes `seconds` on a device at its best ends if it starts at `now`; INFINITY: never, the
 * device fails before. */
double topology_compute_end(const struct topology *, int32_t device, double now, double seconds);
/* And how much of it is done from one time to another. */
double topology_work(const struct topology *, int32_t device, double from, double to);
/* Whether it has failed in the end, and when. */
bool topology_device_failed(const struct topology *, int32_t device, double *at);
/* An error that names the first device which cannot compute in a precision, and what it can. */
int topology_computes(const struct topology *, enum precision, struct err *);
static inline int32_t topology_host(const struct topology *t, int32_t node) { return t->n_devices + node; }
static inline int32_t topology_ssd(const struct topology *t, int32_t node)
{
    return t->n_devices + t->n_nodes + node;
}

/* Writes a gnuplot script that draws the machine into STEM.png; of many nodes and devices the first and the last. */
void topology_draw(const struct topology *, const char *stem, FILE *);

/* ---- compute ---- */

/* What a kernel (or several, one after another) takes of an idle device: seconds, for how many of them arithmetic and
 * memory are busy, and the bytes that memory moves. */
struct kernel_cost { double seconds, arithmetic, memory, bytes; };
static inline void cost_add(struct kernel_cost *sum, struct kernel_cost c)
{
    sum->seconds += c.seconds;
    sum->arithmetic += c.arithmetic;
    sum->memory += c.memory;
    sum->bytes += c.bytes;
}

/* Grouped FFNs on one device: for every expert i, rows[i] tokens through a gated FFN of three matrices d_model x
 * (width[i] or d_expert): one grouped GEMM for gate and up, the activation, one for down. */
struct kernel_cost cost_experts(const struct device_spec *, enum precision, const struct moe_model *, int32_t n,
                       const int64_t *rows, const double *width /* or NULL: 1 */);
/* Their gradients: for each of the two GEMMs one of the input's and one of the weights'. */
struct kernel_cost cost_experts_backward(const struct device_spec *, enum precision, const struct moe_model *,
                                         int32_t n, const int64_t *rows, const double *width);
/* One grouped GEMM: rows x k times k x n per group, nothing for groups without rows. */
struct gemm_group { int64_t rows, n, k; };
struct gemm_bytes { double in, weight, out; }; /* of one element */
struct kernel_cost cost_gemm(const struct device_spec *, enum precision, int32_t n_groups,
                                const struct gemm_group *, const struct gemm_bytes *);
enum latency_op {
    LATENCY_NONE, LATENCY_GEMM, LATENCY_GROUPED_GEMM, LATENCY_PREFILL, LATENCY_DECODE, LATENCY_NORM, LATENCY_ROTATION,
    LATENCY_ACTIVATION, LATENCY_TOP_K, LATENCY_PERMUTE, LATENCY_COMBINE, N_LATENCY_OPS
};
/* What tables of measured times know a kernel by beside its precision (latency_table.h). rows: tokens, or bytes of
 * permute and combine; n: width, experts of top-k, or of attention's core a query's; k: experts chosen, a value's. */
struct latency_key {
    enum latency_op op; /* NONE: they do not know it */
    int32_t groups, heads, kv_heads;
    int64_t n, k;
    double rows, context;
};
/* Anything else: max(flops / rate, bytes / bandwidth) + launch. */
struct kernel_cost cost_plain(const struct device_spec *, enum precision, double flops, double bytes);
/* The same, unless the device's tables have it. */
struct kernel_cost cost_known(const struct device_spec *, enum precision, double flops, double bytes,
                              const struct latency_key *);

/* The seconds alone. */
static inline double compute_experts(const struct device_spec *d, enum precision p, const struct moe_model *m,
                                     int32_t n, const int64_t *rows, const double *width)
{
    return cost_experts(d, p, m, n, rows, width).seconds;
}
static inline double compute_gemm(const struct device_spec *d, enum precision p, int32_t n_groups,
                                  const struct gemm_group *group, const struct gemm_bytes *bytes)
{
    return cost_gemm(d, p, n_groups, group, bytes).seconds;
}
static inline double compute_plain(const struct device_spec *d, enum precision p, double flops, double bytes)
{
    return cost_plain(d, p, flops, bytes).seconds;
}
/* One launch: `groups` GEMMs of one shape, each with its own weights; with no groups anything else. See layer.h. */
struct kernel {
    enum precision precision;
    int32_t groups;
    struct gemm_group shape;
    struct gemm_bytes bytes;
    double flops, traffic;  /* with no groups */
    struct latency_key key; /* likewise */
};
struct kernel_cost cost_kernel(const struct device_spec *, const struct kernel *);
double compute_element_bytes(enum precision); /* of an operand as a kernel of this precision reads it */

/* ---- net: transfers that share links ---- */

struct net_flow {
    int32_t src, dst; /* endpoints */
    double bytes;
    double payload;   /* of these bytes, those that are no headers of messages; 0 in loops */
    int32_t path;     /* as topology_route has it */
    bool loop;        /* src == dst, and the bytes pass through the device's own port all the same */
    double delay;     /* s, on top of the route's latency */
    double at_least;  /* s after the start before which it does not arrive, whatever the links do */
};
struct net_done { int64_t exchange; int32_t dst; double time; }; /* all of an exchange's bytes for dst are there */

/* Adds an exchange's own costs (topology->exchange) to its flows: bytes, delay, at_least. Devices as sources. fused: it
 * goes on in a kernel that runs. sends: [D] scratch. message.c */
struct message_count { double peers, messages; };
void message_costs(const struct topology *, struct net_flow *, size_t n, double message_bytes, bool fused,
                   struct message_count *sends);
/* The same in two steps, for flows that are not all there at once: what each part of the exchange has its source send,
 * and what that costs some of its flows. */
static inline double messages_of(double bytes, double message_bytes)
{
    return message_bytes > 0 ? bytes / message_bytes : 1;
}
static inline void message_add(const struct topology *t, struct message_count *sends, int32_t src, int32_t dst,
                               double bytes, double message_bytes)
{
    int32_t link[TOPOLOGY_MAX_HOPS];
    if (bytes <= 0 || (src == dst && topology_loop(t, src, link) <= 0))
        return;
    sends[src].peers += src != dst;
    sends[src].messages += messages_of(bytes, message_bytes);
}
void message_apply(const struct topology *, struct net_flow *, size_t n, double message_bytes, bool fused,
                   const struct message_count *sends);

/* What flows that start together at `now` become where a network has several paths: with paths = "split" every source's
 * bytes for a leaf are cut so that each path carries the same; otherwise those whose path has failed take another. With
 * "spray" they stay, and having no path left is an error (ERR_RUN).
 * *out NULL: they stay as they are; else n_out flows to be freed. Flows that name a path keep it. topology_paths.c */
int topology_split(const struct topology *, double now, const struct net_flow *, size_t n, struct net_flow **out,
                   size_t *n_out, struct err *);
/* Whether they ever become something else. */
bool topology_splits(const struct topology *);

enum net_tier { NET_BOUND, NET_FLOW, NET_EXACT, NET_SIMGRID, N_NET_TIERS };
extern const char *const net_tier_name[N_NET_TIERS];

struct net; /* state: virtual clock, exchanges under way */

/* bound: every link on its own, carrying an exchange's bytes as if all were there from its start; a receiver has
 *        everything when the last link that its flows cross is done with the exchange.
 * flow:  max-min fair sharing among all flows; rates are found anew for batches of ends.
 * exact: the same without batches.     simgrid: libexec/moelab-simgrid over a pipe.
 * Latency of a flow's route is added to its arrival, not to its sharing. Flows with 0 bytes, or src == dst and no
 * loop, arrive at once. Concurrent exchanges share links in every tier, and links change in every tier: what crosses a
 * failed link waits. */
int net_open(struct net **, const struct topology *, enum net_tier, struct err *);
/* Whether there is a SimGrid server to start. */
bool net_simgrid_available(void);
/* About how long, in seconds of whoever waits, SimGrid takes for an exchange of so many flows that move bytes. */
double net_simgrid_seconds(double n_flows);
/* `id` must not be under way. Starts at `now`: not before any time returned, or `until` passed, so far. Every dst
 * named in a flow is reported once, those that get nothing (src == dst, 0 bytes) at `now`. */
int net_start(struct net *, double now, int64_t id, const struct net_flow *, size_t n, struct err *);
/* Tier bound asks of an exchange only what it puts on each link, and whom that concerns. net_reduce makes that of flows
 * that are nowhere all at once: next(from, room, n) fills in at most n of those that follow and returns how many, 0 at
 * the end. `id` is for messages. net_start_load starts it as net_start would have, and owns it, also when it fails.
 * Other tiers have neither. */
struct net_load;
int net_reduce(struct net *, int64_t id, size_t (*next)(void *from, struct net_flow *room, size_t n), void *from,
               struct net_load **, struct err *);
int net_start_load(struct net *, double now, int64_t id, struct net_load *, struct err *);
/* Marks every dst of the flows in gets[endpoint]; how many they are. */
int32_t net_load_receivers(const struct net_load *, uint8_t *gets);
/* Adds the payload that it puts on each link: bytes[link]. */
void net_load_payload(const struct net_load *, double *bytes);
void net_load_free(struct net_load *);
/* Runs until the first arrival, but not beyond `until`; *n events, all at one time, in order of (exchange, dst);
 * *n = 0: nothing arrives up to `until` (which may be INFINITY when nothing is under way). ERR_RUN with `until`
 * INFINITY: all that is under way waits for a link that failed for good. */
int net_advance(struct net *, double until, struct net_done *done, size_t room, size_t *n, struct err *);
/* Bytes carried so far by each link: [n_links]; those of a flow count when it has ended (bound: those of an exchange
 * when the link is done with it). Valid until the next call; NULL: out of memory. */
const double *net_link_bytes(struct net *);
void net_close(struct net *);

/* ---- machines run task graphs ---- */

struct moe_graph;
struct machine;
struct team;

struct machine_ops {
    const char *name; /* what results say: "flow", "simgrid", "host", "cuda" */
    int (*run)(struct machine *, struct moe_graph *, struct err *); /* sets start and end of every task */
    /* Keeps of an exchange what run() will need, so that its parts need not be in the graph; sets task.load >= 0. What
     * was reduced lasts until the next run() ends. sends: [D] as message_add counts; link_bytes: [n_links] out, what
     * parts between different devices put on each link. NULL: run() needs all parts. */
    int (*reduce)(struct machine *, struct moe_graph *, int32_t task, const struct moe_exchange *,
                  const struct message_count *sends, double *link_bytes, struct err *);
    /* The graph of the last run() once more, with other inputs; NULL: it would take just as long. */
    int (*again)(struct machine *, struct moe_graph *, struct err *);
    void (*close)(struct machine *);
};

struct machine {
    const struct machine_ops *ops;
    const struct topology *topology;
    const struct moe_model *model;
    enum precision precision;
    double now; /* end of what ran last */
    double joules; /* of what ran last; 0: not known */
    /* Machines that really compute; a simulated one leaves these at 0. */
    struct team *team;/* of this process, or NULL */
    int32_t rank;     /* the device that this process is */
    bool verify;      /* compare every output with a plain reference, outside the times */
    bool virtual_ranks; /* all ranks are in this process, on one GPU */
    bool graphs;      /* machine cuda: repetitions of a step are captured once, and launched */
    double queue_s;   /* machine cuda: that queueing what ran last took the host */
    double padding;   /* with graphs: share of experts' rows that mean nothing; captured and launched so far */
    int64_t graphs_captured, graphs_launched;
    const char *products; /* machine cuda: how a task's products are queued, "grouped" or "one by one"; else NULL */
    double max_error; /* largest so far, relative */
    double peak_memory; /* bytes that all ranks together held at most, or 0 */
    int32_t set_aside;/* attempts at repetitions of machine host that others disturbed, of which another was made */
    int32_t disturbed;/* repetitions whose least disturbed attempt was */
    double stolen;    /* most of the processors' time that a hypervisor took in any attempt, as a share */
    double probe_s;   /* median of what machine host's probes took around those that count; 0: none were */
    void *priv;
};

int machine_open_sim(struct machine *, const struct topology *, const struct moe_model *, enum precision,
                     enum net_tier, struct err *);
/* Real execution over MPI, in a process that is a rank: loads the module hw/host.so. The team is MPI's. */
int machine_open_host(struct machine *, const struct topology *, const struct moe_model *, bool verify, struct team *,
                      struct err *);
/* Becomes one of the ranks that mpirun has started. */
int machine_join_host(struct team **, struct err *);
bool machine_host_available(void);
/* Real execution on GPUs: loads the module hw/cuda.so. team NULL: all ranks of the run are in this process, on one
 * GPU; else each in one of the team's, on a GPU of its own. */
int machine_open_cuda(struct machine *, const struct topology *, const struct moe_model *, enum precision, bool verify,
                      bool graphs, struct team *, struct err *);
bool machine_cuda_available(void);
/* Measures this computer, in a process that is a rank: host_calibrate.h. */
struct host_calibration;
int machine_calibrate_host(struct host_calibration *, struct err *);
static inline int machine_run(struct machine *m, struct moe_graph *g, struct err *e) { return m->ops->run(m, g, e); }
static inline void machine_close(struct machine *m) { if (m->ops) m->ops->close(m); m->ops = NULL; }

#endif
