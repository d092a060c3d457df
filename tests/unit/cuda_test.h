/* SPDX-License-Identifier: Apache-2.0
 * cuda_test.h - small runs of machine cuda on the stand-ins. */
#ifndef CUDA_TEST_H
#define CUDA_TEST_H

#include "core_test.h"

#include "cuda.h"
#include "cuda_rank.h"
#include "standin.h"
#include "team.h"

struct shape { int nodes, devices, layers, experts, k, batch, steps; };

static inline json_t *cuda_spec(struct scratch *s, struct shape x)
{
    const int64_t n = (int64_t)x.nodes * x.devices * x.batch * x.steps;
    uint8_t *expert = malloc((size_t)(n * x.layers * x.k));
    assert_non_null(expert);
    for (int64_t i = 0; i < n * x.layers; i++) { /* k different ones each, the low numbers more often */
        const uint64_t r = moe_mix((uint64_t)i);
        const int first = (int)(r % (uint64_t)x.experts * (r >> 32 & 0xff) / 256);
        for (int j = 0; j < x.k; j++)
            expert[i * x.k + j] = (uint8_t)((first + j * (1 + (int)(r >> 40 & 1))) % x.experts);
    }
    const char *trace = test_trace(s, "trace", x.nodes * x.devices * x.batch, x.steps, x.layers, x.experts, x.k,
                                   expert);
    free(expert);
    json_t *machine = test_description("h800-ib", x.nodes);
    json_object_set_new(machine, "devices", json_integer(x.devices));
    json_t *spec = test_spec(machine, trace, x.layers, x.experts, x.k, x.batch, x.steps);
    const char *const small[] = { "d_model", "d_expert", "n_heads", "d_head" };
    const int size[] = { 24, 16, 1, 16 };
    for (int i = 0; i < 4; i++)
        test_set(spec, "model", small[i], json_integer(size[i]));
    test_set(spec, "model", "precision", json_string("fp32"));
    test_set(spec, NULL, "allow_extrapolation", json_true());
    test_set(spec, NULL, "repetitions", json_integer(2));
    return spec;
}

/* Opens the run on a simulated machine and puts ours in its place. No team: virtual ranks. */
static inline struct run *cuda_open_run_as(json_t *spec, struct team *team, bool graphs, struct err *e)
{
    struct run *r = test_open_run(spec, e);
    const enum precision p = r->precision;
    machine_close(&r->machine);
    r->machine = (struct machine){ .topology = r->topology, .model = &r->model, .precision = p, .verify = true,
                                   .virtual_ranks = !team, .team = team, .graphs = graphs };
    r->tier = N_NET_TIERS;
    r->graph.keep_items = true;
    if (moelab_cuda_module.open(&r->machine, e) == 0)
        ((struct cuda *)r->machine.priv)->ring = 1 << 12;
    return r;
}

static inline struct run *cuda_open_run(json_t *spec, struct team *team, struct err *e)
{
    return cuda_open_run_as(spec, team, false, e);
}

#endif
