/* SPDX-License-Identifier: Apache-2.0
 * fuzz_tables.c - latency_table_read on anything: it accepts, and then what it answers is some time, or refuses with a
 * message that names the file. */
#include "config.h"

#include "fuzz.h"
#include "latency_table.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char fuzz_name[] = "fuzz_tables";

/* A scratch file of this process: overwritten each time, removed at its end. */
static char path[64];

static void remove_scratch(void)
{
    unlink(path);
}

static void write_file(const uint8_t *data, size_t n)
{
    unlink(path); /* rewriting in place makes some file systems wait for the disk */
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct latency_table *t;
    struct err err = { 0 };
    if (!*path) {
        snprintf(path, sizeof path, "/tmp/moelab-fuzz-%ld.csv", (long)getpid());
        atexit(remove_scratch);
    }
    write_file(data, n);
    json_t *files = json_pack("[s]", path);
    const int rc = latency_table_read(&t, files, "machine.lua", &err);
    json_decref(files);
    if (rc < 0) {
        if (err.code != rc || !strstr(err.text, path) || t)
            abort();
        return 0;
    }
    for (int op = 0; op < N_LATENCY_OPS; op++)
        for (int p = 0; p < N_PRECISIONS; p++)
            for (double rows = 1; rows < 1e4; rows *= 1.5) {
                const bool attends = op == LATENCY_PREFILL || op == LATENCY_DECODE;
                const struct latency_key key = { .op = (enum latency_op)op, .groups = op == LATENCY_GEMM ? 1 : 4,
                                                 .heads = attends ? 128 : 0, .kv_heads = attends, .n = 4096, .k = 7168,
                                                 .rows = rows, .context = attends ? 3 * rows : 0 };
                double seconds = NAN;
                if (latency_table_lookup(t, (enum precision)p, &key, &seconds) && !(seconds > 0 && seconds < 1e3))
                    abort();
            }
    latency_table_free(t);
    return 0;
}

size_t fuzz_seed(int i, uint8_t *out, size_t room)
{
    static const char *const seed[] = {
        "# a\nop,precision,groups,rows,n,k,latency_us\ngrouped_gemm,fp8,4,64,4096,7168,64.5\n"
        "grouped_gemm,fp8,4,1024,4096,7168,200\ngemm,bf16,1,16,4096,7168,20\n",
        "op,precision,rows,heads,kv_heads,query,value,context,n,bytes,latency_us\n"
        "attention_decode,bf16,1,128,1,4096,7168,1,,,5\nattention_decode,bf16,9999,128,1,4096,7168,1,,,9\n"
        "attention_decode,bf16,1,128,1,4096,7168,99999,,,7\nnorm,fp8,8,,,,,,4096,,2\npermute,fp8,,,,,,,,77,3\n",
        "seconds , k,n,rows,precision,op\r\n1e-5,7168,4096,1,fp32,gemm\r\n\r\n2e-5,7168,4096,9000,fp32,gemm",
    };
    if (i >= (int)(sizeof seed / sizeof seed[0]) || strlen(seed[i]) > room)
        return 0;
    memcpy(out, seed[i], strlen(seed[i]));
    return strlen(seed[i]);
}
