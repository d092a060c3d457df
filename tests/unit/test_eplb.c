/* SPDX-License-Identifier: Apache-2.0
 * test_eplb.c - placement eplb against the outputs of DeepSeek's reference, and what it refuses. */
#include "policy_test.h"

/* Places `weight` [L][E] with the numbers of a case; 0 or the plugin's error. */
static int place_case(const json_t *c, struct policy_host *host, struct policy_placement *placed)
{
    const json_t *weight = json_object_get(c, "weight");
    struct policy_shape shape = {
        .n_layers = (int32_t)json_array_size(weight),
        .n_experts = (int32_t)json_array_size(json_array_get(weight, 0)),
        .top_k = 1,
        .n_devices = test_int(c, "num_gpus"),
        .n_nodes = test_int(c, "num_nodes"),
    };
    const struct moe_plugin *eplb = test_plugin("placement", "eplb");
    struct policy policy;
    char settings[64];
    snprintf(settings, sizeof settings, "replicas=%d groups=%d", test_int(c, "num_replicas"),
             test_int(c, "num_groups"));
    policy_host_open(host, &shape);
    assert_int_equal(policy_start(&policy, host, eplb, settings), MOE_OK);
    double *load = calloc((size_t)shape.n_layers * (size_t)shape.n_experts, sizeof *load);
    for (int32_t l = 0; l < shape.n_layers; l++)
        for (int32_t e = 0; e < shape.n_experts; e++)
            load[l * shape.n_experts + e] = test_at(json_array_get(weight, (size_t)l), e);
    policy_placement_init(placed);
    int rc = eplb->ops.placement.place(policy.state, &(struct moe_stats){.n_steps = 1, .load = load}, &placed->view);
    policy_host_end_hook(host);
    policy_placement_seal(placed, &host->model);
    policy_stop(&policy);
    free(load);
    return rc;
}

static void check_case(const json_t *c)
{
    const json_t *stable = json_object_get(c, "stable");
    struct policy_host host;
    struct policy_placement placed;
    if (place_case(c, &host, &placed) != MOE_OK)
        fail_msg("%s: %s", test_text(c, "name"), host.failure);
    int32_t slots = test_int(c, "num_replicas") / test_int(c, "num_gpus");
    for (int32_t l = 0; l < host.model.n_layers; l++) {
        const json_t *phy2log = json_array_get(json_object_get(stable, "phy2log"), (size_t)l);
        const json_t *logcnt = json_array_get(json_object_get(stable, "logcnt"), (size_t)l);
        int32_t first = placed.layer_first[l];
        assert_int_equal(placed.layer_first[l + 1] - first, json_array_size(phy2log));
        for (int32_t p = 0; p < (int32_t)json_array_size(phy2log); p++) {
            if (placed.replica[first + p].expert != (int32_t)test_at(phy2log, p))
                fail_msg("%s: layer %d, physical expert %d is %d, the reference has %d", test_text(c, "name"), l, p,
                         placed.replica[first + p].expert, (int32_t)test_at(phy2log, p));
            assert_int_equal(placed.replica[first + p].device, p / slots);
        }
        for (int32_t e = 0; e < host.model.n_experts; e++) {
            const int32_t *at = &placed.expert_first[l * host.model.n_experts + e];
            assert_int_equal(at[1] - at[0], (int32_t)test_at(logcnt, e));
        }
    }
    policy_placement_free(&placed);
    policy_host_close(&host);
}

static void check_file(json_t *all)
{
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(all, "cases"), i, c)
        check_case(c);
    assert_true(i > 0);
    json_decref(all);
}

static void golden_cases(void **state)
{
    (void)state;
    check_file(test_golden("eplb.json"));
}

static void every_case_of_the_reference(void **state)
{
    (void)state;
    check_file(test_shared("oracles/eplb.json"));
}

/* max / mean of the devices' loads in the README's example: 1.2081 and 1.2422. */
static void readme_balance(void **state)
{
    (void)state;
    json_t *all = test_golden("eplb.json");
    const json_t *c = json_array_get(json_object_get(all, "cases"), 0);
    const double expected[2] = {1.2081, 1.2422};
    struct policy_host host;
    struct policy_placement placed;
    assert_string_equal(test_text(c, "name"), "readme");
    assert_int_equal(place_case(c, &host, &placed), MOE_OK);
    for (int32_t l = 0; l < 2; l++) {
        const json_t *weight = json_array_get(json_object_get(c, "weight"), (size_t)l);
        double device[8] = {0}, most = 0, sum = 0;
        for (int32_t i = placed.layer_first[l]; i < placed.layer_first[l + 1]; i++) {
            const int32_t *at = &placed.expert_first[l * 12 + placed.replica[i].expert];
            device[placed.replica[i].device] += test_at(weight, placed.replica[i].expert) / (at[1] - at[0]);
        }
        for (int d = 0; d < 8; d++) {
            most = device[d] > most ? device[d] : most;
            sum += device[d];
        }
        assert_true(fabs(most / (sum / 8) - expected[l]) < 5e-5);
    }
    policy_placement_free(&placed);
    policy_host_close(&host);
    json_decref(all);
}

static void refuse(const char *replicas_groups, struct policy_shape shape, const char *expected)
{
    double load[64] = {0};
    struct policy_host host;
    struct policy_placement placed;
    struct policy policy;
    const struct moe_plugin *eplb = test_plugin("placement", "eplb");
    policy_host_open(&host, &shape);
    policy_placement_init(&placed);
    assert_int_equal(policy_start(&policy, &host, eplb, replicas_groups), MOE_OK);
    struct moe_stats stats = {.n_steps = 1, .load = load};
    assert_int_equal(eplb->ops.placement.place(policy.state, &stats, &placed.view), MOE_EINVAL);
    assert_string_equal(host.failure, expected);
    policy_stop(&policy);
    policy_placement_free(&placed);
    policy_host_close(&host);
}

static void what_does_not_divide_is_refused(void **state)
{
    (void)state;
    refuse("replicas=12", (struct policy_shape){1, 16, 1, 4, 1, 0, 0},
           "replicas = 12 is less than the 16 experts of layer 0");
    refuse("replicas=18", (struct policy_shape){1, 16, 1, 4, 1, 0, 0},
           "replicas = 18 is not a multiple of the 4 devices (layer 0)");
    refuse("replicas=0", (struct policy_shape){1, 10, 1, 4, 1, 0, 0},
           "replicas = 10 is not a multiple of the 4 devices (layer 0)");
    refuse("groups=3", (struct policy_shape){1, 16, 1, 4, 1, 0, 0},
           "groups = 3 does not divide the 16 experts of layer 0");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_cases),
        cmocka_unit_test(every_case_of_the_reference),
        cmocka_unit_test(readme_balance),
        cmocka_unit_test(what_does_not_divide_is_refused),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
