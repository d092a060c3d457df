/* SPDX-License-Identifier: Apache-2.0
 * units.c - quantities with their unit. A number alone, bits and powers of 1024 are refused: 400 Gb/s, 50 GB/s and
 * 46.6 GiB/s have been mistaken for each other too often to guess. */
#include "config.h"

#include "units.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PREFIXES = 6 };

static const struct kind {
    const char *expected;
    struct prefix {
        const char *name;
        double factor;
    } unit[MAX_PREFIXES]; /* ascending */
} kinds[N_UNITS] = {
    [UNIT_BYTES] = { "a size in B, kB, MB, GB or TB",
                     { { "B", 1 }, { "kB", 1e3 }, { "MB", 1e6 }, { "GB", 1e9 }, { "TB", 1e12 } } },
    [UNIT_BANDWIDTH] = { "a bandwidth in B/s, kB/s, MB/s, GB/s or TB/s",
                         { { "B/s", 1 }, { "kB/s", 1e3 }, { "MB/s", 1e6 }, { "GB/s", 1e9 }, { "TB/s", 1e12 } } },
    [UNIT_RATE] = { "a rate in GFLOP/s, TFLOP/s or PFLOP/s",
                    { { "GFLOP/s", 1e9 }, { "TFLOP/s", 1e12 }, { "PFLOP/s", 1e15 } } },
    [UNIT_SECONDS] = { "a time in ns, us, ms or s", { { "ns", 1e-9 }, { "us", 1e-6 }, { "ms", 1e-3 }, { "s", 1 } } },
    [UNIT_POWER] = { "a power in mW, W, kW or MW", { { "mW", 1e-3 }, { "W", 1 }, { "kW", 1e3 }, { "MW", 1e6 } } },
    [UNIT_JOULES_PER_BYTE] = { "an energy per byte in pJ/B, pJ/bit, nJ/B or J/B",
                               { { "pJ/B", 1e-12 }, { "pJ/bit", 8e-12 }, { "nJ/B", 1e-9 }, { "J/B", 1 } } },
};

/* Units that are refused, and what they are in those of a kind. */
static const struct foreign {
    const char *name;
    double factor;
    enum unit kind;
    const char *what;
} foreigners[] = {
    { "kb/s", 125, UNIT_BANDWIDTH, "bits" },
    { "Mb/s", 125e3, UNIT_BANDWIDTH, "bits" },
    { "Gb/s", 125e6, UNIT_BANDWIDTH, "bits" },
    { "Tb/s", 125e9, UNIT_BANDWIDTH, "bits" },
    { "Mbit/s", 125e3, UNIT_BANDWIDTH, "bits" },
    { "Gbit/s", 125e6, UNIT_BANDWIDTH, "bits" },
    { "Tbit/s", 125e9, UNIT_BANDWIDTH, "bits" },
    { "Mbps", 125e3, UNIT_BANDWIDTH, "bits" },
    { "Gbps", 125e6, UNIT_BANDWIDTH, "bits" },
    { "Tbps", 125e9, UNIT_BANDWIDTH, "bits" },
    { "KiB/s", 0x1p10, UNIT_BANDWIDTH, "binary" },
    { "MiB/s", 0x1p20, UNIT_BANDWIDTH, "binary" },
    { "GiB/s", 0x1p30, UNIT_BANDWIDTH, "binary" },
    { "TiB/s", 0x1p40, UNIT_BANDWIDTH, "binary" },
    { "KiB", 0x1p10, UNIT_BYTES, "binary" },
    { "MiB", 0x1p20, UNIT_BYTES, "binary" },
    { "GiB", 0x1p30, UNIT_BYTES, "binary" },
    { "TiB", 0x1p40, UNIT_BYTES, "binary" },
    { "Mb", 125e3, UNIT_BYTES, "bits" },
    { "Gb", 125e6, UNIT_BYTES, "bits" },
    { "MBps", 1e6, UNIT_BANDWIDTH, "no SI unit" },
    { "GBps", 1e9, UNIT_BANDWIDTH, "no SI unit" },
    { "KB/s", 1e3, UNIT_BANDWIDTH, "no SI unit" },
    { "KB", 1e3, UNIT_BYTES, "no SI unit" },
    { "GT/s", 0, UNIT_BANDWIDTH, "transfers of a lane" },
    { "TFLOPS", 1e12, UNIT_RATE, "no SI unit" },
    { "PFLOPS", 1e15, UNIT_RATE, "no SI unit" },
    { "TOPS", 1e12, UNIT_RATE, "no SI unit" },
};

char *units_write(enum unit kind, double value, int figures, char *out, size_t room)
{
    const struct prefix *unit = kinds[kind].unit, *best = unit;
    for (int i = 1; i < MAX_PREFIXES && unit[i].name; i++)
        if (fabs(value) >= unit[i].factor * (1 - 1e-9))
            best = &unit[i];
    for (int i = 0; value == 0 && i < MAX_PREFIXES && unit[i].name; i++)
        if (unit[i].factor == 1)
            best = &unit[i];
    const double scaled = value / best->factor;
    if (figures < 4 && fabs(scaled) >= 1000 && fabs(scaled) < 1e4) /* under the last prefix: no exponent yet */
        figures = 4;
    snprintf(out, room, "%.*g %s", figures, scaled, best->name);
    return out;
}

/* All of a figure when it is short, else three digits: the reader is to check it anyway. */
static void write_short(enum unit kind, double value, char *out, size_t room)
{
    char digits[40];
    snprintf(digits, sizeof digits, "%.6g", value);
    units_write(kind, value, fabs(strtod(digits, NULL) - value) <= 1e-12 * fabs(value) ? 6 : 3, out, room);
}

void units_refuse_number(enum unit kind, double value, double min, double max, char *why, size_t room)
{
    const struct prefix *in_range[MAX_PREFIXES];
    char proper[64];
    int n = 0;
    write_short(kind, value, proper, sizeof proper);
    for (const struct prefix *p = kinds[kind].unit; p < kinds[kind].unit + MAX_PREFIXES && p->name; p++)
        if (value * p->factor >= min && value * p->factor <= max)
            in_range[n++] = p;
    if (value >= min && value <= max)
        snprintf(why, room, "without a unit; write \"%s\"", proper);
    else if (n == 0)
        snprintf(why, room, "without a unit; expected %s", kinds[kind].expected);
    else
        snprintf(why, room, "without a unit: ");
    for (int i = 0; i < n && !(value >= min && value <= max); i++)
        snprintf(why + strlen(why), room - strlen(why), "%s\"%g %s\"%s", i == 0 ? "" : i + 1 < n ? ", " : " or ",
                 value, in_range[i]->name, i + 1 < n ? "" : "?");
}

const char *units_expected(enum unit kind)
{
    return kinds[kind].expected;
}

static const struct prefix *find(enum unit kind, const char *name)
{
    for (const struct prefix *p = kinds[kind].unit; p < kinds[kind].unit + MAX_PREFIXES && p->name; p++)
        if (!strcmp(p->name, name))
            return p;
    return NULL;
}

static void refuse_unit(enum unit kind, double number, const char *name, char *why, size_t room)
{
    char proper[64];
    snprintf(why, room, "expected %s", kinds[kind].expected);
    if (!*name) {
        snprintf(why, room, "without a unit; expected %s", kinds[kind].expected);
        return;
    }
    for (size_t i = 0; i < sizeof foreigners / sizeof *foreigners; i++) {
        const struct foreign *f = &foreigners[i];
        if (strcmp(f->name, name) != 0)
            continue;
        write_short(f->kind, number * f->factor, proper, sizeof proper);
        if (f->kind == kind && f->factor > 0)
            snprintf(why, room, "%s; write \"%s\"", f->what, proper);
        else
            snprintf(why, room, "%s; expected %s", f->what, kinds[kind].expected);
        return;
    }
    for (int other = 0; other < N_UNITS; other++)
        if (find((enum unit)other, name))
            snprintf(why, room, "%.*s; expected %s",
                     (int)(strstr(kinds[other].expected, " in ") - kinds[other].expected), kinds[other].expected,
                     kinds[kind].expected);
}

bool units_parse(enum unit kind, const char *text, double *value, char *why, size_t room)
{
    char digits[40], *end;
    size_t n = strspn(text, "0123456789.+-");
    if (n > 0 && (text[n] == 'e' || text[n] == 'E') && strspn(text + n + 1, "+-0123456789"))
        n += 1 + strspn(text + n + 1, "+-0123456789");
    snprintf(why, room, "expected %s", kinds[kind].expected);
    if (n == 0 || n >= sizeof digits)
        return false;
    memcpy(digits, text, n);
    digits[n] = '\0';
    const double number = strtod(digits, &end);
    if (*end || !isfinite(number))
        return false;
    const char *name = text + n + strspn(text + n, " ");
    const struct prefix *unit = find(kind, name);
    if (!unit) {
        refuse_unit(kind, number, name, why, room);
        return false;
    }
    /* As 3.35e12 is read: the product 3.35 * 1e12 may be the number beside it. */
    char whole[60], *exponent = strpbrk(digits, "eE");
    const double bits = unit->factor == 8e-12 ? 8 : 1; /* per byte, exactly; the rest of a factor is a power of 10 */
    const long power = lround(log10(unit->factor / bits)) + (exponent ? strtol(exponent + 1, NULL, 10) : 0);
    if (exponent)
        *exponent = '\0';
    snprintf(whole, sizeof whole, "%se%ld", digits, power);
    *value = bits * strtod(whole, NULL);
    return isfinite(*value);
}
