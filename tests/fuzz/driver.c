/* SPDX-License-Identifier: Apache-2.0
 *
 * driver.c - runs a fuzz target without libFuzzer: a fixed number of seeded mutations of its valid inputs, so that
 * `make check` does the same everywhere. FUZZ_RUNS sets how many (default 20000), FUZZ_SEED where they begin;
 * arguments are files to run instead, such as one that crashed.
 *
 * With libFuzzer leave this file out: clang -fsanitize=fuzzer,address,undefined fuzz_npy.c ...
 */
#include "fuzz.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROOM = 1 << 14 };

static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static size_t below(uint64_t *state, size_t n)
{
    return n ? (size_t)(next(state) % n) : 0;
}

/* One random change; returns the new size. Most hit the first 160 bytes, where headers are. */
static size_t mutate(uint8_t *data, size_t n, uint64_t *state)
{
    static const uint8_t interesting[] = { 0,   1,   0x7f, 0x80, 0xff, '0', '9', '-',
                                           '(', ')', ',',  '\'', '{',  '}', ' ', 'T' };
    static const char *const words[] = {
        "99999999999999999999", "4294967296", "-1", "True", "'<f8'", "'|O'", "()", "(0,)"
    };
    size_t at = below(state, next(state) % 4 && n > 160 ? 160 : n), rest = n - at;
    switch (next(state) % 7) {
    case 0:
        if (rest)
            data[at] ^= (uint8_t)(1u << below(state, 8));
        return n;
    case 1:
        if (rest)
            data[at] = interesting[below(state, sizeof interesting)];
        return n;
    case 2:
        return next(state) % 4 ? n : at; /* cut off */
    case 3: {                            /* take some out */
        size_t gone = below(state, rest < 16 ? rest + 1 : 16);
        memmove(data + at, data + at + gone, rest - gone);
        return n - gone;
    }
    case 4: { /* put some in */
        size_t more = below(state, 16);
        if (n + more > ROOM)
            return n;
        memmove(data + at + more, data + at, rest);
        for (size_t i = 0; i < more; i++)
            data[at + i] = (uint8_t)next(state);
        return n + more;
    }
    case 5: { /* a word over what is there */
        const char *word = words[below(state, sizeof words / sizeof *words)];
        size_t length = strlen(word);
        memcpy(data + at, word, length < rest ? length : rest);
        return n;
    }
    default:
        if (rest >= 8) { /* a wide integer */
            uint64_t wide = next(state) >> below(state, 64);
            memcpy(data + at, &wide, sizeof wide);
        }
        return n;
    }
}

static int run_files(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f) {
            perror(argv[i]);
            return 2;
        }
        size_t n = fread(data, 1, sizeof data, f);
        fclose(f);
        LLVMFuzzerTestOneInput(data, n);
    }
    return 0;
}

int main(int argc, char **argv)
{
    static uint8_t seed[ROOM], data[ROOM];
    const char *runs_text = getenv("FUZZ_RUNS"), *seed_text = getenv("FUZZ_SEED");
    uint64_t n_runs = runs_text ? strtoull(runs_text, NULL, 10) : 20000, done = 0;
    uint64_t state = seed_text ? strtoull(seed_text, NULL, 10) : 1;
    int n_seeds = 0;
    if (argc > 1)
        return run_files(argc, argv);
    while (fuzz_seed(n_seeds, seed, ROOM))
        n_seeds++;
    for (; n_seeds && done < n_runs; done++) {
        size_t n = fuzz_seed((int)(done % (uint64_t)n_seeds), data, ROOM);
        uint64_t n_changes = done < (uint64_t)n_seeds ? 0 : 1 + next(&state) % 4; /* first the seeds themselves */
        for (uint64_t i = 0; i < n_changes; i++)
            n = mutate(data, n, &state);
        LLVMFuzzerTestOneInput(data, n);
    }
    printf("1..1\n%s 1 - %s: %" PRIu64 " mutations of %d inputs\n", n_seeds ? "ok" : "not ok", fuzz_name, done,
           n_seeds);
    return n_seeds ? 0 : 1;
}
