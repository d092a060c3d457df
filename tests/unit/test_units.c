/* SPDX-License-Identifier: Apache-2.0
 * test_units.c - quantities with their unit, and what the others are told. */
#include "machine_test.h"
#include "units.h"

static void read(void **state)
{
    (void)state;
    static const struct { enum unit kind; const char *text; double value; } good[] = {
        { UNIT_BANDWIDTH, "50 GB/s", 50e9 },       { UNIT_BANDWIDTH, "3.35 TB/s", 3.35e12 },
        { UNIT_BANDWIDTH, "31.5GB/s", 31.5e9 },    { UNIT_BANDWIDTH, "7450 MB/s", 7.45e9 },
        { UNIT_BANDWIDTH, "50e9 B/s", 50e9 },      { UNIT_BANDWIDTH, "1.5e3 kB/s", 1.5e6 },
        { UNIT_BYTES, "80 GB", 80e9 },             { UNIT_BYTES, "2 TB", 2e12 },
        { UNIT_BYTES, "0 B", 0 },                  { UNIT_RATE, "989.4 TFLOP/s", 989.4e12 },
        { UNIT_RATE, "2.5 PFLOP/s", 2.5e15 },      { UNIT_SECONDS, "500 ns", 500e-9 },
        { UNIT_SECONDS, "2.5 us", 2.5e-6 },        { UNIT_SECONDS, "3 ms", 3e-3 },
        { UNIT_SECONDS, "-1 s", -1 },              { UNIT_POWER, "0.7 kW", 700 },
        { UNIT_POWER, "350 mW", 0.35 },            { UNIT_JOULES_PER_BYTE, "31.2 pJ/B", 31.2e-12 },
        { UNIT_JOULES_PER_BYTE, "1.3 pJ/bit", 8 * 1.3e-12 }, { UNIT_JOULES_PER_BYTE, "2 nJ/B", 2e-9 },
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        double x = NAN;
        char why[200];
        if (!units_parse(good[i].kind, good[i].text, &x, why, sizeof why) || x != good[i].value) /* to the last bit */
            fail_msg("%s: found %.17g (%s), expected %.17g", good[i].text, x, why, good[i].value);
    }
}

static void refuse(void **state)
{
    (void)state;
    static const struct { enum unit kind; const char *text, *why; } bad[] = {
        { UNIT_BANDWIDTH, "400 Gb/s", "bits; write \"50 GB/s\"" },
        { UNIT_BANDWIDTH, "400 Gbps", "bits; write \"50 GB/s\"" },
        { UNIT_BANDWIDTH, "400 Gbit/s", "bits; write \"50 GB/s\"" },
        { UNIT_BANDWIDTH, "46.5 GiB/s", "binary; write \"49.9 GB/s\"" },
        { UNIT_BYTES, "80 GiB", "binary; write \"85.9 GB\"" },
        { UNIT_BYTES, "512 KiB", "binary; write \"524.288 kB\"" },
        { UNIT_BYTES, "80 KB", "no SI unit; write \"80 kB\"" },
        { UNIT_BYTES, "80 GB/s", "a bandwidth; expected a size in B, kB, MB, GB or TB" },
        { UNIT_BANDWIDTH, "80 GB", "a size; expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "80 GiB", "binary; expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "80", "without a unit; expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "16 GT/s", "transfers of a lane; expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "50 gb/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "GB/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "0x10 GB/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "1.2.3 GB/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "nan GB/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "1e999 GB/s", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_BANDWIDTH, "50 GB/s each", "expected a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s" },
        { UNIT_RATE, "989 TFLOPS", "no SI unit; write \"989 TFLOP/s\"" },
        { UNIT_SECONDS, "2 usec", "expected a time in ns, us, ms or s" },
        { UNIT_POWER, "700 J/B", "an energy per byte; expected a power in mW, W, kW or MW" },
        { UNIT_JOULES_PER_BYTE, "4 W", "a power; expected an energy per byte in pJ/B, pJ/bit, nJ/B or J/B" },
        { UNIT_SECONDS, "", "expected a time in ns, us, ms or s" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double x;
        char why[200] = "accepted";
        units_parse(bad[i].kind, bad[i].text, &x, why, sizeof why);
        if (strcmp(why, bad[i].why) != 0)
            fail_msg("\"%s\": found \"%s\", expected \"%s\"", bad[i].text, why, bad[i].why);
    }
}

static void numbers(void **state)
{
    (void)state;
    char text[200];
    units_refuse_number(UNIT_BANDWIDTH, 50e9, 1e6, 1e16, text, sizeof text);
    assert_string_equal(text, "without a unit; write \"50 GB/s\"");
    units_refuse_number(UNIT_BANDWIDTH, 614.4e9, 1e6, 1e16, text, sizeof text);
    assert_string_equal(text, "without a unit; write \"614.4 GB/s\"");
    units_refuse_number(UNIT_SECONDS, 5e-7, 0, 1, text, sizeof text);
    assert_string_equal(text, "without a unit; write \"500 ns\"");
    /* Nobody means 50 B/s or 32 s. */
    units_refuse_number(UNIT_BANDWIDTH, 50, 1e6, 1e16, text, sizeof text);
    assert_string_equal(text, "without a unit: \"50 MB/s\", \"50 GB/s\" or \"50 TB/s\"?");
    units_refuse_number(UNIT_SECONDS, 2500, 0, 1, text, sizeof text);
    assert_string_equal(text, "without a unit: \"2500 ns\" or \"2500 us\"?");
    units_refuse_number(UNIT_RATE, 5e19, 1e9, 1e19, text, sizeof text);
    assert_string_equal(text, "without a unit; expected a rate in GFLOP/s, TFLOP/s or PFLOP/s");
    assert_string_equal(units_write(UNIT_BANDWIDTH, 53.55e9, 4, text, sizeof text), "53.55 GB/s");
    assert_string_equal(units_write(UNIT_BANDWIDTH, 1234.4e12, 3, text, sizeof text), "1234 TB/s");
    assert_string_equal(units_write(UNIT_SECONDS, 0, 3, text, sizeof text), "0 s");
    assert_string_equal(units_write(UNIT_POWER, 0, 3, text, sizeof text), "0 W");
    assert_string_equal(units_write(UNIT_POWER, 700, 3, text, sizeof text), "700 W");
    assert_string_equal(units_write(UNIT_BYTES, 0, 3, text, sizeof text), "0 B");
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(read), cmocka_unit_test(refuse), cmocka_unit_test(numbers) };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
