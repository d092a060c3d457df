/* SPDX-License-Identifier: Apache-2.0
 * gemm.c - how long a grouped GEMM takes on one device: what tiles and waves cost, beside arithmetic and memory.
 *
 * Y[g] = X[g] W[g], rows[g] x k times k x n, all groups in one launch of a persistent kernel as DeepGEMM's:
 *
 *   tiles     tile_m x tile_n of Y. tile_m is 64 if groups have at most 64 rows on average, else 128; tile_n is the
 *             multiple of 8 from 16 to 128 with the fewest waves, then the fullest last wave, then the least waste
 *   one tile  its k steps, by tensor cores or by what one SM draws from L2, whichever is slower (soft: both stall a
 *             little), and its result's way out, which nothing hides
 *   waves     as many tiles at once as there are SMs; the last wave counts in full
 *   memory    every operand read once and the result written, at the reachable bandwidth
 *   launch    fixed
 *
 * Tiles and memory overlap, but neither hides the other wholly: a p-norm with exponent `overlap` joins the two. With 1
 * they add up, as on a processor that packs operands before it multiplies (calibrate.c); its products of one row pack
 * nothing. Its tiles are tile_m x 16, whatever the sizes; rows that fill none come in halves of one, quarters and so on
 * (3 of 4: a half and a quarter), each of which takes `rest` of a tile's time: short loops use few registers. */
#include "config.h"

#include "latency_table.h"

#include <math.h>

/* Where tensor cores and operand fetch come near each other, each stalls the other: a 4-norm, 19 % at a tie. */
static double slower(double a, double b)
{
    return pow(a * a * a * a + b * b * b * b, 0.25);
}

static double tile_seconds(const struct device_spec *d, enum precision p, double m, double n, double k,
                           const struct gemm_bytes *b)
{
    const double rate = d->peak[p] / d->gemm.sms * d->gemm.mma_efficiency;
    return slower(2 * m * n * k / rate, (m * b->in + n * b->weight) * k / d->gemm.port_bandwidth) +
           m * n * b->out / d->gemm.store_bandwidth;
}

/* A processor's product of one row, which packs nothing: memory alone counts. */
static bool is_vector(const struct device_spec *d, const struct gemm_group *g)
{
    return g->rows == 1 && d->gemm.vector_efficiency > 0;
}

/* What is read and written, in seconds. A processor's library puts weights in order before it multiplies, and reads
 * rows as they lie, as it reads the weights of a product of one row: those go at another rate. */
static double memory_seconds(const struct device_spec *d, double rows, double weights, double vectors)
{
    const double packed = d->mem_bandwidth * d->gemm.mem_efficiency;
    if (d->gemm.vector_efficiency <= 0)
        return (rows + weights + vectors) / packed;
    return weights / packed + (rows + vectors) / (d->mem_bandwidth * d->gemm.vector_efficiency);
}

static double tiles_of(const struct device_spec *d, const struct gemm_group *g, int64_t tile_m, int64_t tile_n)
{
    if (g->rows <= 0 || is_vector(d, g))
        return 0;
    double high = (double)((g->rows + tile_m - 1) / tile_m);
    if (d->gemm.rest > 0) {
        high = (double)(g->rows / tile_m);
        for (int64_t rest = g->rows % tile_m; rest > 0; rest &= rest - 1)
            high += d->gemm.rest;
    }
    return high * (double)((g->n + tile_n - 1) / tile_n);
}

/* The widths that a kernel chooses from; the first of the best. *waves: how often the SMs are filled. */
static int64_t choose_tile(const struct device_spec *d, int32_t n_groups, const struct gemm_group *group,
                           int64_t tile_m, double *waves, double *n_tiles)
{
    int64_t best = 0;
    double last = 0;
    *waves = INFINITY;
    const int64_t widest = d->gemm.tile_m > 0 ? 16 : 128;
    for (int64_t tile_n = 16; tile_n <= widest; tile_n += 8) {
        double tiles = 0;
        for (int32_t g = 0; g < n_groups; g++)
            tiles += tiles_of(d, &group[g], tile_m, tile_n);
        const double w = d->gemm.sms > 1 ? ceil(tiles / d->gemm.sms) : tiles, rest = tiles - (w - 1) * d->gemm.sms;
        if (w < *waves || (w == *waves && rest > last)) {
            *waves = w;
            *n_tiles = tiles;
            last = rest;
            best = tile_n;
        }
    }
    return best;
}

struct kernel_cost cost_gemm(const struct device_spec *d, enum precision p, int32_t n_groups,
                             const struct gemm_group *group, const struct gemm_bytes *b)
{
    double sum = 0, busy = 0, rows = 0, weights = 0, vectors = 0, waves, n_tiles = 0, seconds = 0, one = 0;
    for (int32_t g = 0; g < n_groups; g++) {
        const double m = (double)group[g].rows, n = (double)group[g].n, k = (double)group[g].k;
        if (group[g].rows <= 0)
            continue;
        const bool vector = is_vector(d, &group[g]);
        busy++;
        sum += m;
        rows += vector ? 0 : m * k * b->in + m * n * b->out;
        weights += vector ? 0 : n * k * b->weight;
        vectors += vector ? m * k * b->in + n * k * b->weight + m * n * b->out : 0;
    }
    if (busy == 0)
        return (struct kernel_cost){ 0 };
    const int64_t tile_m = d->gemm.tile_m > 0 ? (int64_t)d->gemm.tile_m : sum / busy <= 64 ? 64 : 128;
    const int64_t tile_n = choose_tile(d, n_groups, group, tile_m, &waves, &n_tiles);
    for (int32_t g = 0; g < n_groups; g++) { /* groups of one k need it once */
        if (g == 0 || group[g].k != group[g - 1].k)
            one = tile_seconds(d, p, (double)tile_m, (double)tile_n, (double)group[g].k, b);
        seconds += tiles_of(d, &group[g], tile_m, tile_n) * one;
    }
    const double computing = n_tiles > 0 ? waves * seconds / n_tiles : 0, q = d->gemm.overlap;
    const double bytes = rows + weights + vectors, memory = memory_seconds(d, rows, weights, vectors);
    const double modelled = d->gemm.launch_s + pow(pow(computing, q) + pow(memory, q), 1 / q);
    if (!d->tables)
        return (struct kernel_cost){ modelled, computing, memory, bytes };
    /* What was measured keeps arithmetic and memory as busy as the model says. */
    const double measured = latency_table_gemm(d->tables, p, n_groups, group, b, modelled), share = measured / modelled;
    return (struct kernel_cost){ measured, computing * share, memory * share, bytes };
}
