/* SPDX-License-Identifier: Apache-2.0
 * test_memory.c - how much memory there is, read from trees of files made up as the kernel lays them out. */
#include "core_test.h"

#include "memory.h"

#include <sys/stat.h>

/* The file DIR/path says text; its directories are made. */
static void says(struct scratch *s, const char *path, const char *text)
{
    char at[512];
    int n = snprintf(at, sizeof at, "%s/%s", s->dir, path);
    assert_in_range(n, 1, sizeof at - 1);
    for (char *c = at + strlen(s->dir) + 1; (c = strchr(c, '/')); *c++ = '/') {
        *c = '\0';
        mkdir(at, 0777);
    }
    FILE *f = fopen(at, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void left_is(struct scratch *s, double bytes, const char *source)
{
    struct memory_left m;
    memory_left(s->dir, &m);
    if (m.bytes != bytes || strcmp(m.source, source))
        fail_msg("found %.0f (%s), expected %.0f (%s)", m.bytes, m.source, bytes, source);
}

static void nothing_to_read(void **state)
{
    left_is(*state, -1, "");
    says(*state, "proc/meminfo", "MemTotal: 100 kB\nMemFree: 50 kB\n"); /* a kernel before 3.14 */
    left_is(*state, -1, "");
}

static void no_cgroup(void **state)
{
    says(*state, "proc/meminfo", "MemTotal:       100 kB\nMemAvailable:    70 kB\nSwapFree: 1 kB\n");
    left_is(*state, 70 * 1024, "MemAvailable of /proc/meminfo");
}

static void version_2(void **state)
{
    struct scratch *s = *state;
    says(s, "proc/meminfo", "MemAvailable: 70 kB\n");
    says(s, "proc/self/cgroup", "0::/user/mine\n");
    says(s, "sys/fs/cgroup/user/mine/memory.max", "max\n");
    left_is(s, 70 * 1024, "MemAvailable of /proc/meminfo");
    /* What files take is no loss; the limit above counts as well. */
    says(s, "sys/fs/cgroup/user/memory.max", "50000\n");
    says(s, "sys/fs/cgroup/user/memory.current", "30000\n");
    says(s, "sys/fs/cgroup/user/memory.stat", "anon 1\ninactive_file 4000\nactive_file 9\n");
    left_is(s, 24000, "/sys/fs/cgroup/user/memory.max");
    says(s, "sys/fs/cgroup/user/mine/memory.max", "10000\n");
    left_is(s, 10000, "/sys/fs/cgroup/user/mine/memory.max");
    says(s, "sys/fs/cgroup/user/mine/memory.current", "12000\n");
    left_is(s, 0, "/sys/fs/cgroup/user/mine/memory.max");
}

static void version_1(void **state)
{
    struct scratch *s = *state;
    says(s, "proc/meminfo", "MemAvailable: 70 kB\n");
    says(s, "proc/self/cgroup", "9:cpu,cpuacct:/elsewhere\n4:memory:/box\n0::/\n");
    says(s, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    says(s, "sys/fs/cgroup/memory/memory.usage_in_bytes", "5\n");
    left_is(s, 70 * 1024, "MemAvailable of /proc/meminfo");
    says(s, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "40000\n");
    says(s, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", "15000\n");
    says(s, "sys/fs/cgroup/memory/box/memory.stat", "inactive_file 1\ntotal_inactive_file 5000\n");
    left_is(s, 30000, "/sys/fs/cgroup/memory/box/memory.limit_in_bytes");
}

/* In a container the path may be the outside's; the limit then stands at the top. */
static void container(void **state)
{
    struct scratch *s = *state;
    says(s, "proc/self/cgroup", "0::/../../outside\n");
    says(s, "sys/fs/cgroup/memory.max", "8000\n");
    left_is(s, 8000, "/sys/fs/cgroup/memory.max");
}

static void a_limit_alone(void **state)
{
    struct scratch *s = *state;
    says(s, "sys/fs/cgroup/memory.max", "8000\n"); /* and no /proc */
    left_is(s, 8000, "/sys/fs/cgroup/memory.max");
}

/* 64 MB more, and they were the most there was. */
static void this_process(void **state)
{
    (void)state;
    const size_t n = 64 << 20;
    double before = memory_own();
    if (before == 0)
        skip();
    char *p = malloc(n);
    assert_non_null(p);
    for (size_t i = 0; i < n; i += 4096)
        *(volatile char *)(p + i) = 1;
    double with = memory_own();
    free(p);
    assert_true(with - before > 0.95 * (double)n && with - before < 1.5 * (double)n);
    assert_true(memory_peak() > 0.95 * (double)n);
}

static void text(void **state)
{
    (void)state;
    char t[16];
    assert_string_equal(memory_text(0, t, sizeof t), "0.0 kB");
    assert_string_equal(memory_text(999.4e6, t, sizeof t), "999 MB");
    assert_string_equal(memory_text(999.6e6, t, sizeof t), "1.0 GB");
    assert_string_equal(memory_text(24.76e9, t, sizeof t), "24.8 GB");
    assert_string_equal(memory_text(582e12, t, sizeof t), "582 TB");
}

#define WITH_FILES(test) cmocka_unit_test_setup_teardown(test, scratch_make, scratch_remove)

int main(void)
{
    const struct CMUnitTest tests[] = {
        WITH_FILES(nothing_to_read), WITH_FILES(no_cgroup), WITH_FILES(version_2), WITH_FILES(version_1),
        WITH_FILES(container), WITH_FILES(a_limit_alone), cmocka_unit_test(this_process), cmocka_unit_test(text),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("memory", tests, NULL, NULL);
}
