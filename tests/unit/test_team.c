/* SPDX-License-Identifier: Apache-2.0
 * test_team.c - ranks that moelab starts by itself: this program starts itself several times, as `moelab run` does.
 * What a rank does is the word in the file that it is given. */
#include "config.h"

#include "machine_test.h"
#include "rank_start.h"
#include "team.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { N = 4, LIMIT_S = 30 };

/* ---- a rank ---- */

/* Everybody's number, twice; then a text of rank 0's. */
static int talk(struct team *t, struct err *e)
{
    int mine[2] = { t->rank, 100 + t->rank }, all[2 * N];
    char long_text[100001], *text = long_text;
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = '\0';
    for (int round = 0; round < 3; round++) {
        if (t->ops->gather(t, mine, sizeof mine, all, e) < 0)
            return 10;
        for (int i = 0; i < t->size; i++)
            if (all[2 * i] != i || all[2 * i + 1] != 100 + i)
                return 11;
    }
    if (t->ops->alive(t, e) < 0 || t->lost) /* nobody has left: they wait for the text */
        return 13;
    if (t->rank > 0)
        text = NULL;
    if (t->ops->tell(t, &text, e) < 0 || strcmp(text, long_text) != 0)
        return 12;
    if (t->rank > 0)
        free(text);
    return 0;
}

static int agree(struct team *t, struct err *e)
{
    if (team_agree(t, e) != 0 || t->agreed)
        return 20;
    if (t->rank >= 2)
        err_set(e, ERR_RUN, "bad luck of %d", t->rank);
    if (team_agree(t, e) != ERR_RUN || strcmp(e->text, "rank 2: bad luck of 2") != 0 || !t->agreed)
        return 21;
    *e = (struct err){ 0 };
    err_set(e, ERR_INPUT, "the same everywhere");
    if (team_agree(t, e) != ERR_INPUT || strcmp(e->text, "the same everywhere") != 0)
        return 22;
    *e = (struct err){ 0 };
    if (t->rank == 1)
        err_set(e, ERR_RUN, "rank 1, GPU 7: has its number already");
    return team_agree(t, e) != ERR_RUN || strcmp(e->text, "rank 1, GPU 7: has its number already") != 0 ? 23 : 0;
}

static int same(struct team *t, struct err *e)
{
    if (team_same(t, "thing", "equal", e) != 0 || team_same_graph(t, 42, e) != 0)
        return 30;
    if (team_same(t, "thing", t->rank == 3 ? "b" : "a", e) != ERR_INPUT || !t->agreed ||
        strcmp(e->text, "rank 3 has another thing than rank 0: found b, expected a") != 0)
        return 31;
    *e = (struct err){ 0 };
    return team_same_graph(t, t->rank == 2 ? 1 : 0, e) != ERR_RUN ||
           strncmp(e->text, "rank 2 decided otherwise than rank 0", 36) != 0 ? 32 : 0;
}

static int be_rank(const char *path)
{
    char word[40] = "";
    struct team *t = NULL;
    struct err e = { 0 };
    FILE *f = fopen(path, "r");
    alarm(LIMIT_S);
    if (!f || !fgets(word, sizeof word, f) || fclose(f) != 0 || team_open(&t, &e) < 0 || !t || t->size != N)
        return 99;
    int code = !strcmp(word, "talk") ? talk(t, &e) : !strcmp(word, "agree") ? agree(t, &e)
             : !strcmp(word, "same") ? same(t, &e) : 0;
    const bool ends = t->rank == 2;
    if (ends && !strcmp(word, "signal"))
        kill(getpid(), SIGKILL);
    if (ends && !strcmp(word, "code"))
        _exit(3);
    if (!ends && !strcmp(word, "code")) /* the others notice, and say so in good order */
        code = team_agree(t, &e) == ERR_RUN && t->lost ? 0 : 40;
    if (!strcmp(word, "hang") && !ends)
        pause();
    if (!strcmp(word, "hang"))
        _exit(5);
    team_leave(t);
    return code;
}

/* ---- who starts them ---- */

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct launch start(const char *word)
{
    struct launch l = { .machine = "test", .n_ranks = N, .local = true };
    struct err e = { 0 };
    snprintf(l.dir, sizeof l.dir, "/tmp/moelab-team-XXXXXX");
    assert_non_null(mkdtemp(l.dir));
    snprintf(l.spec, sizeof l.spec, "%s/spec", l.dir);
    snprintf(l.log, sizeof l.log, "%s/log", l.dir);
    snprintf(l.result, sizeof l.result, "%s/result", l.dir);
    FILE *f = fopen(l.spec, "w");
    assert_true(f && fputs(word, f) >= 0 && fclose(f) == 0);
    assert_int_equal(rank_start(&l, &e), 0);
    assert_int_equal(l.n_pids, N);
    assert_int_equal(rank_wait(&l, NULL, &e), 0);
    assert_int_equal(l.n_pids, 0);
    unlink(l.spec);
    unlink(l.log);
    assert_int_equal(rmdir(l.dir), 0);
    return l;
}

static void they_talk(void **state)
{
    static const char *const words[] = { "talk", "agree", "same" };
    (void)state;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        const struct launch l = start(words[i]);
        assert_string_equal(l.ended, "");
        assert_int_equal(l.status, 0);
    }
}

static void they_end(void **state)
{
    (void)state;
    struct launch l = start("signal");
    assert_true(strncmp(l.ended, "rank 2 was ended by signal 9 (Killed)", 37) == 0);
    assert_true(l.by_signal && l.ended_rank == 2);
    l = start("code");
    assert_string_equal(l.ended, "rank 2 ended with exit code 3");
    assert_true(!l.by_signal && l.ended_rank == 2);
}

/* Those that do not notice are ended, and that is not what is told. */
static void they_are_ended(void **state)
{
    const double began = now_s();
    (void)state;
    const struct launch l = start("hang");
    assert_string_equal(l.ended, "rank 2 ended with exit code 5");
    assert_true(now_s() - began < 10);
}

static void bad_words(void **state)
{
    static const char *const bad[] = { "", "0", "0 0", "2 2 3", "-1 2 3", "0 65", "1 2", "1 2 x", "1 2 999",
                                      "0 3 0,999" };
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct team *t;
        struct err e = { 0 };
        assert_int_equal(team_join_pipes(&t, bad[i], &e), ERR_INPUT);
        assert_true(strncmp(e.text, "MOELAB_TEAM=", 12) == 0);
    }
    struct team_pipes p;
    struct err e = { 0 };
    assert_int_equal(team_pipes_make(&p, TEAM_PIPES_MAX + 1, &e), ERR_INPUT);
}

/* One alone needs nobody. */
static void nobody(void **state)
{
    struct err e = { 0 };
    (void)state;
    assert_int_equal(team_agree(NULL, &e), 0);
    assert_int_equal(team_same(NULL, "thing", "a", &e), 0);
    assert_int_equal(team_same_graph(NULL, 1, &e), 0);
    err_set(&e, ERR_RUN, "its own");
    assert_int_equal(team_agree(NULL, &e), ERR_RUN);
    team_leave(NULL);
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "rank"))
        return be_rank(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(they_talk), cmocka_unit_test(they_end), cmocka_unit_test(they_are_ended),
        cmocka_unit_test(bad_words), cmocka_unit_test(nobody),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
