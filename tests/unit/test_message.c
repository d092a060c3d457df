/* SPDX-License-Identifier: Apache-2.0
 * test_message.c - what an exchange costs beside its bytes, worked out by hand.
 *
 * star-50GBps: 50 kB take 1 us over a device's NIC, each way on its own; 0.5 us of latency. Here an exchange starts up
 * in 10 us, and 2 us for each peer; a message has 1 kB of its own and keeps its sender busy for 0.25 us. */
#include "core_test.h"

static struct topology *costly(void)
{
    json_t *d = test_description("star-50GBps", 4);
    json_object_set_new(d, "exchange", json_pack("{s:s, s:s, s:s, s:s, s:s}", "startup", "10 us", "per_peer", "2 us",
                                                 "per_message", "250 ns", "message_overhead", "1 kB", "source",
                                                 "a test"));
    return test_build(d);
}

static double end_of(const struct topology *t, enum net_tier tier, const struct moe_exchange *x)
{
    struct moe_graph g = { .n_devices = t->n_devices };
    struct err e = { 0 };
    assert_true(graph_exchange(&g, x, &e) >= 0);
    double end = test_run_graph(t, tier, &g);
    graph_free(&g);
    return end;
}

static void start_up_and_peers(void **state)
{
    (void)state;
    struct topology *t = costly();
    struct moe_part part[] = { { 0, 1, 49e3, 0, NULL, 0 }, { 0, 2, 99e3, 0, NULL, 0 } };
    for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
        /* 50 + 100 kB leave device 0 */
        assert_near(end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 2, part }), (3 + 0.5 + 10 + 2 * 2) * 1e-6,
                    1e-9);
        assert_near(end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 2, part, .fused = true }), 3.5e-6, 1e-9);
    }
    topology_free(t);
}

static void messages(void **state)
{
    (void)state;
    struct topology *t = costly();
    struct moe_part part = { 0, 1, 40e3, 0, NULL, 0 };
    for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
        /* 4 messages of 10 kB: 44 kB on the links; the sender needs 1 us */
        assert_near(end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &part, 10e3, 0, true }), 1.38e-6, 1e-9);
        /* 40 of 1 kB: 80 kB, but 10 us of the sender */
        assert_near(end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &part, 1e3, 0, true }), 10e-6, 1e-9);
        assert_near(end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 1, &part, 1e3, 0, false }), 22e-6, 1e-9);
    }
    topology_free(t);
}

/* A device's own rows take its port's time where the layout says so, and nothing where there is no port. */
static void own_port(void **state)
{
    (void)state;
    struct topology *t = test_links_alone("dgx-h100", 1), *star = costly();
    const double rate = t->link[0].bandwidth; /* gpu0.nvlink.out */
    struct moe_part part[] = { { 0, 0, rate * 10e-6, 0, NULL, 0 }, { 0, 1, rate * 10e-6, 0, NULL, 0 } };
    for (enum net_tier tier = NET_BOUND; tier <= NET_EXACT; tier++) {
        double both = end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 2, part, .fused = true });
        double alone = end_of(t, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 1, part + 1, .fused = true });
        /* bound: the last byte on the port may be one that does not leave, without the 1 us of latency. */
        assert_near(both - alone, tier == NET_BOUND ? 9e-6 : 10e-6, 1e-9);
        assert_near(end_of(star, tier, &(struct moe_exchange){ MOE_PAY_BYTES, 1, part, .fused = true }), 0, 0);
    }
    topology_free(t);
    topology_free(star);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(start_up_and_peers),
        cmocka_unit_test(messages),
        cmocka_unit_test(own_port),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
