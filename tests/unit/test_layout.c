/* SPDX-License-Identifier: Apache-2.0
 * test_layout.c - a layout that does exactly what the layer needs passes; one row, byte or edge less does not.
 *
 * Three devices, each a node, expert e on device e, one token each. Token 0 goes to 1 and 2, token 1 to 1 and 2, token
 * 2 to 0 and 2. Hidden states: 0 to 1, 0 to 2, 1 to 2, 2 to 0, a row each; outputs the other way; 1, 2 and 3 rows. */
#include "core_test.h"

enum fault {
    HONEST, TWO_TASKS, FORWARDED, NO_HIDDEN, HALF_HIDDEN, NO_OUTPUT, ROW_SHORT, OTHER_EXPERT, HALF_WIDTH, TO_ITSELF,
    AS_BYTES, EXIT_EARLY, EXIT_BEFORE_OUTPUTS, EXPERTS_EARLY, SENT_EARLY, RETURNED_EARLY, N_FAULTS
};

static const char *const says[N_FAULTS] = {
    [NO_HIDDEN] = "device 1 receives the hidden states of 1 tokens too few",
    [HALF_HIDDEN] = "device 1 receives the hidden states of 0.5 tokens too few",
    [NO_OUTPUT] = "device 2 sends the outputs of 1 tokens too few",
    [ROW_SHORT] = "device 2 computes 1 rows of expert 2 too few",
    [OTHER_EXPERT] = "device 1 computes 2 rows of expert 1 too few",
    [HALF_WIDTH] = "device 2 computes 1.5 rows of expert 2 too few",
    [TO_ITSELF] = "device 1 receives the outputs of 1 tokens too few",
    [AS_BYTES] = "device 0 receives the hidden states of 1 tokens too few",
    [EXIT_EARLY] = "exit[1]",
    [EXIT_BEFORE_OUTPUTS] = "device 1 goes on at",
    [EXPERTS_EARLY] = "device 0 computes 0 rows after hidden states have come in, expected 1",
    [SENT_EARLY] = "wait for no token",
    [RETURNED_EARLY] = "sends outputs at",
};

struct layout { const struct moe_env *env; enum fault fault; };

static int keep_env(void *self, const void *conf, const struct moe_env *env)
{
    (void)conf;
    ((struct layout *)self)->env = env;
    return 0;
}

static int32_t send(const struct layout *l, struct moe_graph *g, enum moe_payload payload)
{
    static const int32_t way[4][2] = { { 0, 1 }, { 0, 2 }, { 1, 2 }, { 2, 0 } };
    struct moe_part part[4];
    for (int i = 0; i < 4; i++) {
        const bool out = payload == MOE_PAY_OUTPUT;
        part[i] = (struct moe_part){ way[i][out], way[i][!out], 1000, 0, NULL, 0 };
    }
    if (payload == MOE_PAY_HIDDEN) {
        part[0].bytes *= l->fault == NO_HIDDEN ? 0 : l->fault == HALF_HIDDEN ? 0.5 : 1;
        part[1].src = l->fault == FORWARDED ? 1 : 0; /* which has it from 0 */
        payload = l->fault == AS_BYTES ? MOE_PAY_BYTES : payload;
    } else if (l->fault == NO_OUTPUT) {
        part[1].bytes = 0; /* token 0 has device 1's */
    } else if (l->fault == TO_ITSELF) {
        part[2].dst = 2;
    }
    return l->env->host->task_exchange(l->env, g, &(struct moe_exchange){ payload, 4, part });
}

static int lay_out(void *self, const struct moe_traffic *in, struct moe_graph *g)
{
    const struct layout *l = self;
    const struct moe_host *host = l->env->host;
    int32_t there = send(l, g, MOE_PAY_HIDDEN), back = send(l, g, MOE_PAY_OUTPUT);
    for (int32_t d = 0; d < 3; d++) {
        const int32_t expert = l->fault == OTHER_EXPERT ? 0 : d;
        const int n_tasks = l->fault == TWO_TASKS && d == 2 ? 2 : 1;
        if (l->fault != SENT_EARLY)
            host->task_after(l->env, g, there, in->entry[d]);
        for (int i = 0; i < n_tasks; i++) {
            const int64_t rows = n_tasks == 2 ? 1 + i : d + 1 - (d == 2 && l->fault == ROW_SHORT);
            int32_t x = host->task_experts(l->env, g, &(struct moe_expert_work){
                .device = d, .layer = in->layer, .n = 1, .expert = &expert, .rows = &rows,
                .fraction = d == 2 && l->fault == HALF_WIDTH ? 0.5f : 1 });
            host->task_after(l->env, g, x, l->fault == EXPERTS_EARLY ? in->entry[d] : there);
            if (l->fault != RETURNED_EARLY)
                host->task_after(l->env, g, back, x);
            in->exit[d] = d == 1 && l->fault == EXIT_BEFORE_OUTPUTS ? x : back;
            if (l->fault == RETURNED_EARLY) { /* waits for all, but the outputs left before there were any */
                in->exit[d] = host->task_compute(l->env, g, &(struct moe_work){ .device = d, .op = MOE_OP_COMBINE });
                host->task_after(l->env, g, in->exit[d], x);
                host->task_after(l->env, g, in->exit[d], back);
            }
        }
    }
    if (l->fault == RETURNED_EARLY)
        host->task_after(l->env, g, back, there);
    if (l->fault == EXIT_EARLY)
        in->exit[1] = there;
    return 0;
}

static const struct moe_plugin plugin = TEST_POLICY(MOE_DISPATCH, "exact", .state_size = sizeof(struct layout),
                                                    .init = keep_env, .ops.dispatch = { .lay_out = lay_out });

static void exactly_enough(void **state)
{
    static const uint8_t expert[6] = { 1, 2, 1, 2, 0, 2 };
    /* One request per token: with three streams, stream s plays request s from its only token. */
    const char *trace = test_trace(*state, "three", 3, 1, 1, 3, 2, expert);
    for (int fault = HONEST; fault < N_FAULTS; fault++) {
        struct err e = { 0 };
        json_t *spec = test_spec(test_description("star-50GBps", 3), trace, 1, 3, 2, 1, 1);
        struct run *r = test_open_run(spec, &e);
        test_swap_policy(r, &r->dispatch, &plugin);
        ((struct layout *)r->dispatch.self)->fault = (enum fault)fault;
        for (int32_t s = 0; s < 3; s++) { /* in the order of the trace, not shuffled */
            r->workload.played[s] = s;
            r->workload.stream[s].at = s;
            r->workload.stream[s].token = s;
        }
        int code = run_go(r);
        if (!says[fault] && code != 0)
            fail_msg("fault %d: %s", fault, e.text);
        if (says[fault])
            assert_says(&e, code, "dispatch exact, layer 0", says[fault], NULL);
        test_close_run(r);
        json_decref(spec);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(exactly_enough, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
