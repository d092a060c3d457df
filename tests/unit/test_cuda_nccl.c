/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_nccl.c - machine cuda with a process for each rank: forked here, on stand-ins for CUDA and NCCL
 * (standin.h), talking through the sockets that moelab's own ranks have. Whole steps are computed and verified on
 * every rank, what is sent is compared with what the graph carries and with a list written by hand, and ranks fail and
 * die. */
#include "cuda_test.h"

#include <sys/wait.h>
#include <unistd.h>

enum { MAX_RANKS = 8, LIMIT_S = 60 };

/* What goes wrong, and on which rank. */
struct fault { int rank, dies, memory; bool decides_otherwise, shares_gpu, quits; };
static const struct fault none = { .rank = -1, .dies = -1 };

/* What a rank leaves behind. */
struct left { int code, status; double max_error, end; uint64_t decisions; char text[1024]; char *calls; };

/* ---- a rank ---- */

static int place_elsewhere(void *self, const struct moe_stats *stats, struct moe_placement *out)
{
    const struct moe_env *env = ((struct test_env *)self)->env;
    (void)stats;
    for (int l = 0; l < env->model->n_layers; l++)
        for (int x = 0; x < env->model->n_experts; x++)
            env->host->place(env, out, l, x, 0, 1);
    return 0;
}

static const struct moe_plugin elsewhere = TEST_POLICY(MOE_PLACEMENT, "elsewhere",
    .state_size = sizeof(struct test_env), .init = test_keep_env, .ops.placement = { .place = place_elsewhere });

/* Only what is this rank's stays open: the end of a socket is how others learn of an end. */
static struct team *join(struct team_pipes *p, int rank, struct err *e)
{
    struct team *t = NULL;
    team_pipes_become(p, rank);
    for (int i = 1; i < p->size; i++) {
        if (rank > 0)
            close(p->root[i]);
        if (rank != i)
            close(p->own[i]);
    }
    team_open(&t, e);
    return t;
}

static bool as_graphs; /* steps are captured */

static void write_left(const char *stem, int rank, const struct left *l)
{
    char path[600];
    snprintf(path, sizeof path, "%s-%d", stem, rank);
    FILE *f = fopen(path, "w");
    if (!f || fwrite(l, sizeof *l, 1, f) != 1 || fputs(standin_calls(), f) < 0 || fclose(f) != 0)
        _exit(8);
}

static void be_rank(json_t *spec, struct team_pipes *pipes, int rank, const struct fault *fault, const char *stem)
{
    struct err e = { 0 };
    struct left l = { .code = 0 };
    const bool mine = rank == fault->rank;
    alarm(LIMIT_S);
    standin_open((enum standin_order)(rank % 3), (uint64_t)rank, -1);
    standin_device(cudaSuccess, fault->shares_gpu ? 1 : MAX_RANKS, CUDART_VERSION);
    standin_nccl_become(rank, mine ? fault->dies : -1);
    struct team *t = join(pipes, rank, &e);
    if (!t)
        _exit(7);
    struct run *r = cuda_open_run_as(spec, t, as_graphs, &e);
    if (mine && fault->decides_otherwise)
        test_swap_policy(r, &r->placement, &elsewhere);
    if (mine && fault->memory)
        standin_memory((size_t)fault->memory);
    if (mine && fault->quits)
        _exit(0);
    if (!e.code)
        run_go(r);
    l.code = e.code;
    memcpy(l.text, e.text, sizeof l.text);
    l.max_error = r->machine.max_error;
    l.end = r->machine.now;
    l.decisions = r->decisions;
    write_left(stem, rank, &l);
    if (!t->lost) {
        test_close_run(r);
        team_leave(t);
        if (!e.code && standin_left() != 0)
            _exit(6);
    }
    _exit(0);
}

/* Takes the specification; left: [n], to be freed with free_left(). */
static void run_ranks(struct scratch *s, json_t *spec, int n, const struct fault *fault, struct left *left)
{
    struct err e = { 0 };
    struct team_pipes pipes;
    pid_t pid[MAX_RANKS];
    char stem[500], path[600];
    snprintf(stem, sizeof stem, "%s/rank", s->dir);
    standin_nccl_open(n);
    test_ok(team_pipes_make(&pipes, n, &e), &e);
    fflush(NULL);
    for (int i = 0; i < n; i++) {
        pid[i] = fork();
        assert_true(pid[i] >= 0);
        if (pid[i] == 0)
            be_rank(spec, &pipes, i, fault, stem);
    }
    team_pipes_close(&pipes);
    standin_nccl_close();
    for (int i = 0; i < n; i++) {
        int status = 0;
        assert_int_equal(waitpid(pid[i], &status, 0), pid[i]);
        left[i] = (struct left){ .status = status };
        snprintf(path, sizeof path, "%s-%d", stem, i);
        FILE *f = fopen(path, "r");
        if (!f)
            continue;
        assert_int_equal(fread(&left[i], sizeof left[i], 1, f), 1);
        const long from = ftell(f);
        fseek(f, 0, SEEK_END);
        const size_t room = (size_t)(ftell(f) - from);
        fseek(f, from, SEEK_SET);
        left[i].calls = calloc(room + 1, 1);
        assert_non_null(left[i].calls);
        assert_int_equal(fread(left[i].calls, 1, room, f), room);
        left[i].status = status;
        fclose(f);
        unlink(path);
    }
    json_decref(spec);
}

static void free_left(struct left *left, int n)
{
    for (int i = 0; i < n; i++)
        free(left[i].calls);
}

static void run_well(struct scratch *s, json_t *spec, int n, struct left *left)
{
    run_ranks(s, spec, n, &none, left);
    for (int i = 0; i < n; i++) {
        if (left[i].status != 0 || left[i].code != 0)
            fail_msg("rank %d of %d: status %x: %s", i, n, (unsigned)left[i].status, left[i].text);
        assert_true(left[i].max_error > 1e-9 && left[i].max_error < 1e-5);
        assert_true(left[i].max_error == left[0].max_error); /* the largest of all, everywhere */
        assert_true(left[i].end == left[0].end && left[i].end > 0);
        assert_true(left[i].decisions == left[0].decisions);
    }
}

/* ---- whole runs ---- */

static uint64_t decisions_of(json_t *spec)
{
    struct err e = { 0 };
    struct run *r = test_open_run(spec, &e);
    test_ok(run_go(r), &e);
    const uint64_t decisions = r->decisions;
    test_close_run(r);
    json_decref(spec);
    return decisions;
}

static void two_to_eight_ranks(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 4, 2, 3, 2 }, { 3, 1, 2, 6, 2, 4, 2 }, { 2, 2, 3, 8, 3, 4, 2 },
                                           { 5, 1, 1, 10, 2, 3, 1 }, { 3, 2, 1, 12, 3, 3, 1 }, { 7, 1, 1, 14, 2, 2, 1 },
                                           { 2, 4, 2, 16, 4, 3, 2 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int d = 0; d < 2; d++) {
            struct left left[MAX_RANKS];
            const int n = shapes[i].nodes * shapes[i].devices;
            json_t *spec = cuda_spec(*state, shapes[i]);
            test_policy(spec, "dispatch", d ? "node-dedup" : "flat");
            test_policy(spec, "placement", i % 2 ? "eplb" : "round-robin");
            const uint64_t decisions = decisions_of(json_incref(spec));
            run_well(*state, spec, n, left);
            assert_true(left[0].decisions == decisions);
            free_left(left, n);
        }
}

/* Sizes of what two ranks exchange are padded alike in both processes. */
static void captured(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 4, 2, 3, 3 }, { 3, 1, 2, 6, 2, 4, 3 }, { 2, 2, 3, 8, 3, 4, 2 } };
    as_graphs = true;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int d = 0; d < 2; d++) {
            struct left left[MAX_RANKS];
            const int n = shapes[i].nodes * shapes[i].devices;
            json_t *spec = cuda_spec(*state, shapes[i]);
            test_policy(spec, "dispatch", d ? "node-dedup" : "flat");
            run_well(*state, spec, n, left);
            for (int rank = 0; rank < n; rank++)
                assert_non_null(strstr(left[rank].calls, " launch "));
            free_left(left, n);
        }
    as_graphs = false;
}

static void offloaded_experts(void **state)
{
    struct left left[2];
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 2, 8, 2, 4, 4 });
    test_policy(spec, "offload", "lru");
    test_set(spec, NULL, "cache", json_real(0.25));
    run_well(*state, spec, 2, left);
    free_left(left, 2);
}

/* Each rank looks at its own experts more closely: cuda_verify_fp8.c. */
static void in_fp8(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 8, 2, 4, 2 }, { 2, 2, 2, 16, 4, 4, 2 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct left left[4];
        const int n = shapes[i].nodes * shapes[i].devices;
        json_t *spec = cuda_spec(*state, shapes[i]);
        test_set(spec, "model", "d_model", json_integer(48));
        test_set(spec, "model", "d_expert", json_integer(32));
        test_set(spec, "model", "precision", json_string("fp8"));
        run_ranks(*state, spec, n, &none, left);
        for (int r = 0; r < n; r++) {
            if (left[r].status != 0 || left[r].code != 0)
                fail_msg("rank %d of %d: status %x: %s", r, n, (unsigned)left[r].status, left[r].text);
            assert_true(left[r].max_error > 1e-4 && left[r].max_error < 1e-2);
            assert_non_null(strstr(left[r].calls, " gemm in fp8 "));
        }
        free_left(left, n);
    }
}

/* Weights that move are sent as bytes in several rounds. */
static void moving_weights(void **state)
{
    struct left left[2];
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 2, 8, 2, 4, 4 });
    json_t *eplb = json_pack("[{s:s, s:{s:i, s:i}}]", "name", "eplb", "params", "replicas", 12, "interval", 2);
    json_object_set_new(json_object_get(spec, "policies"), "placement", eplb);
    run_well(*state, spec, 2, left);
    assert_non_null(strstr(left[0].calls, "send to 1, "));
    free_left(left, 2);
}

/* ---- what is sent ---- */

/* Sum of the numbers that follow each `what`, but for single bytes, which barriers send. */
static double sum_of(const char *calls, const char *what)
{
    double sum = 0;
    for (const char *at = calls; (at = strstr(at, what)) != NULL; at++) {
        const double bytes = strtod(at + strlen(what), NULL);
        sum += bytes > 1 ? bytes : 0;
    }
    return sum;
}

static void conserves(void **state)
{
    static const struct shape shapes[] = { { 2, 1, 2, 16, 2, 5, 1 }, { 3, 1, 2, 12, 3, 5, 1 }, { 2, 2, 2, 16, 4, 5, 1 },
                                           { 3, 2, 2, 24, 4, 5, 1 }, { 2, 4, 2, 16, 4, 5, 1 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct err e = { 0 };
        struct left left[MAX_RANKS];
        const int n = shapes[i].nodes * shapes[i].devices;
        json_t *spec = cuda_spec(*state, shapes[i]);
        test_policy(spec, "dispatch", i % 2 ? "node-dedup" : "flat");
        test_set(spec, NULL, "repetitions", json_integer(1));
        double carried[MAX_RANKS][MAX_RANKS] = { { 0 } };
        standin_open(STANDIN_ANY, i, -1);
        struct run *r = cuda_open_run(json_incref(spec), NULL, &e);
        test_ok(run_go(r), &e);
        for (int32_t j = 0; j < r->graph.n_parts; j++) {
            const struct moe_part *p = &r->graph.part[j];
            carried[p->src][p->dst] += p->src == p->dst ? 0 : 96.0 * (double)p->n_items;
        }
        test_close_run(r);
        json_decref(spec);
        run_well(*state, spec, n, left);
        for (int from = 0; from < n; from++)
            for (int to = 0; to < n; to++) {
                char sends[40], receives[40];
                snprintf(sends, sizeof sends, "send to %d, ", to);
                snprintf(receives, sizeof receives, "receive from %d, ", from);
                /* The step runs twice: once to warm up. */
                assert_near(sum_of(left[from].calls, sends), 2 * carried[from][to], 1e-12);
                assert_near(sum_of(left[to].calls, receives), 2 * carried[from][to], 1e-12);
            }
        free_left(left, n);
    }
}

/* test_cuda.c's two ranks with a token each, both for expert 0 on rank 0, as each of them queues it. Stream 0 computes,
 * stream 1 exchanges. */
static const char rank_0[] =
    "s0 send to 1, 1\n"        /* the barrier, behind which the clock starts */
    "s0 receive from 1, 1\n"
    "s0 group of 2\n";
static const char rank_0_layer[] =
    "s0 gather 1\n"
    "s1 waits s0\n"
    "s1 receive from 1, 96\n"
    "s1 group of 1\n"
    "s0 waits s1\n"
    "s0 gather 2\n"
    "s0 gemms of 2 3072\n"
    "s0 activate 32\n"
    "s0 gemm 1536\n"
    "s0 gather 2\n"
    "s1 waits s0\n"
    "s1 send to 1, 96\n"
    "s1 group of 1\n"
    "s0 waits s1\n"
    "s0 combine 1\n";
static const char rank_1_layer[] =
    "s0 gather 1\n"
    "s1 waits s0\n"
    "s1 send to 0, 96\n"
    "s1 group of 1\n"
    "s1 receive from 0, 96\n"
    "s1 group of 1\n"
    "s0 waits s1\n"
    "s0 combine 1\n";

/* From the first row that is put in order to the end of the layer. */
static void assert_layer(const char *calls, const char *expected)
{
    const char *from = strstr(calls, "s0 gather 1\n");
    assert_non_null(from);
    if (strncmp(from, expected, strlen(expected)) != 0)
        fail_msg("queued:\n%.*s\nexpected:\n%s", (int)strlen(expected), from, expected);
}

static void golden(void **state)
{
    struct left left[2];
    json_t *spec = cuda_spec(*state, (struct shape){ 2, 1, 1, 2, 1, 1, 1 });
    test_set(spec, NULL, "repetitions", json_integer(1));
    run_well(*state, spec, 2, left);
    assert_non_null(strstr(left[0].calls, rank_0));
    assert_layer(left[0].calls, rank_0_layer);
    assert_layer(left[1].calls, rank_1_layer);
    free_left(left, 2);
}

/* ---- what goes wrong ---- */

static json_t *small(struct scratch *s, int n)
{
    return cuda_spec(s, (struct shape){ n, 1, 2, 2 * n, 2, 3, 2 });
}

/* All ranks that are left say this. */
static void assert_all_say(const struct left *left, int n, int without, const char *text)
{
    for (int i = 0; i < n; i++)
        if (i != without && (left[i].code == 0 || !strstr(left[i].text, text)))
            fail_msg("rank %d: status %x: \"%s\", expected \"%s\"", i, (unsigned)left[i].status, left[i].text, text);
}

static void failures(void **state)
{
    static const struct { struct fault fault; const char *text; } cases[] = {
        { { .rank = 1, .dies = -1, .memory = 28000 }, "rank 1: out of device memory" },
        { { .rank = 2, .dies = -1, .decides_otherwise = true }, "rank 2 decided otherwise than rank 0" },
        { { .rank = -1, .dies = -1, .shares_gpu = true }, "ranks 0 and 1 would share a GPU: there are 3 ranks on" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct left left[3];
        run_ranks(*state, small(*state, 3), 3, &cases[i].fault, left);
        assert_all_say(left, 3, -1, cases[i].text);
        free_left(left, 3);
    }
}

/* Whenever a rank dies, the others end by themselves, and those that it has spoken to last say which it was. */
static void deaths(void **state)
{
    static const struct fault cases[] = { { .rank = 1, .dies = -1, .quits = true }, { .rank = 1, .dies = 0 },
                                          { .rank = 0, .dies = 3 }, { .rank = 2, .dies = 5 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct left left[3];
        char seen[40];
        bool named = false;
        run_ranks(*state, small(*state, 3), 3, &cases[i], left);
        snprintf(seen, sizeof seen, "rank %d has ended", cases[i].rank);
        for (int r = 0; r < 3; r++) {
            if (r == cases[i].rank)
                continue;
            assert_true(WIFEXITED(left[r].status) && WEXITSTATUS(left[r].status) == 0); /* not by the alarm */
            assert_true(left[r].code < 0);
            named |= strstr(left[r].text, seen) != NULL || strstr(left[r].text, "remote error") != NULL;
        }
        assert_true(named);
        free_left(left, 3);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(two_to_eight_ranks, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(captured, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(offloaded_experts, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(in_fp8, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(moving_weights, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(conserves, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(golden, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(failures, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(deaths, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
