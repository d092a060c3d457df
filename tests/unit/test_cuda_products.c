/* SPDX-License-Identifier: Apache-2.0
 * test_cuda_products.c - the products of machine cuda on stand-ins (standin.h): which calls of cuBLAS a task of experts
 * makes, with which matrices and sizes, and that what is computed is right. */
#include "cuda_test.h"

#include "host_model.h"

/* ---- what each call has to be ---- */

static bool is_weights(const struct cuda *c, const void *at)
{
    for (int32_t r = 0; r < c->n_here; r++)
        for (int64_t i = 0; i < (int64_t)c->model->n_layers * c->model->n_experts; i++) {
            const char *w = c->rank[r].weights[i];
            if (w && (const char *)at >= w && (const char *)at < w + cuda_expert_bytes(c, i))
                return true;
        }
    return false;
}

/* The call that is `back` from the last one on weights. */
static const struct standin_call *call_of(const struct cuda *c, const struct standin_call *all, size_t n, size_t back)
{
    for (size_t i = n; i-- > 0;)
        if (is_weights(c, all[i].product[0].a) && back-- == 0)
            return &all[i];
    fail_msg("too few calls of cuBLAS");
    return NULL;
}

static void assert_product(const struct standin_product *p, int m, int n, int k, const void *weights)
{
    if (p->m != m || p->n != n || p->k != k || p->a != weights)
        fail_msg("%d x %d x %d of %p, expected %d x %d x %d of %p", p->m, p->n, p->k, p->a, m, n, k, weights);
}

/* Where the outputs of one expert's routes are: rows behind each other from `to`. */
static void assert_outputs(const struct cuda_rank *r, const struct moe_graph *g, const struct task *t,
                           const int64_t *item, int64_t n, const char *to, size_t row)
{
    for (int64_t i = 0; i < n; i++)
        assert_ptr_equal((const char *)r->rows.at + (size_t)r->route_row[g->route_first[t->layer] + item[i]] * row,
                         to + (size_t)i * row);
}

/* The two calls of a task: experts without rows are left out, and hidden layers are what gate wrote. */
static void assert_task(const struct cuda *c, const struct moe_graph *g, const struct task *t,
                        const struct standin_call *in, const struct standin_call *out)
{
    const struct cuda_rank *r = &c->rank[t->device];
    const int64_t *item = g->item + t->first_item;
    const int d = c->model->d_model;
    const char *end_in = NULL, *end_gate = NULL, *end_up = NULL;
    int n = 0;
    for (int32_t i = t->first; i < t->first + t->n; i++)
        n += g->rows[i] > 0;
    assert_int_equal(in->n, 2 * n);
    assert_int_equal(out->n, n);
    n = 0;
    for (int32_t i = t->first; i < t->first + t->n; item += g->rows[i++]) {
        const int rows = (int)g->rows[i], width = host_width(c->model, t->layer, g->expert[i]);
        if (rows == 0)
            continue;
        const size_t matrix = cuda_aligned(c->element * (size_t)(d * width));
        const size_t hidden = c->element * (size_t)(rows * width);
        const char *w = r->weights[(int64_t)t->layer * c->model->n_experts + g->expert[i]];
        const struct standin_product *gate = &in->product[2 * n], *up = gate + 1, *down = &out->product[n];
        assert_product(gate, width, rows, d, w);
        assert_product(up, width, rows, d, w + matrix);
        assert_product(down, d, rows, width, w + 2 * matrix);
        assert_ptr_equal(gate->b, up->b);
        assert_ptr_equal(down->b, gate->c);
        if (n > 0) /* behind what the one before reads and writes */
            assert_true((const char *)gate->b >= end_in && (char *)gate->c >= end_gate && (char *)up->c >= end_up);
        end_in = (const char *)gate->b + (size_t)rows * row_bytes(c);
        end_gate = (char *)gate->c + hidden;
        end_up = (char *)up->c + hidden;
        assert_outputs(r, g, t, item, rows, down->c, row_bytes(c));
        n++;
    }
}

/* Of the last time that the step ran. */
static int assert_calls(const struct run *r)
{
    const struct cuda *c = r->machine.priv;
    const struct moe_graph *g = &r->graph;
    const struct standin_call *all;
    const size_t n = standin_blas(&all);
    size_t back = 0;
    int many = 0;
    for (int32_t i = g->n_tasks; i-- > 0;) {
        const struct task *t = &g->task[c->plan.sequence[i]];
        int64_t rows = 0;
        int32_t with_rows = 0;
        for (int32_t j = t->first; t->kind == TASK_EXPERTS && j < t->first + t->n; j++) {
            rows += g->rows[j];
            with_rows += g->rows[j] > 0;
        }
        if (rows == 0)
            continue;
        assert_task(c, g, t, call_of(c, all, n, back + 1), call_of(c, all, n, back));
        back += 2;
        many += with_rows > 1;
    }
    return many;
}

static const struct shape shapes[] = { { 2, 1, 2, 8, 2, 5, 2 }, { 3, 1, 2, 12, 3, 5, 2 }, { 2, 2, 2, 16, 4, 5, 2 },
                                       { 5, 1, 2, 20, 4, 4, 2 }, { 3, 2, 2, 24, 4, 4, 2 }, { 7, 1, 1, 28, 3, 4, 2 },
                                       { 2, 4, 2, 32, 4, 4, 2 } };

/* Runs the specification, which it takes; then `check`. The largest error. */
static double run_checked(json_t *spec, uint64_t seed, bool one_by_one, int (*check)(const struct run *), int *found)
{
    struct err e = { 0 };
    standin_open((enum standin_order)(seed % 3), seed, -1);
    struct run *r = cuda_open_run(spec, NULL, &e);
    test_ok(e.code, &e);
    ((struct cuda *)r->machine.priv)->products.one_by_one = one_by_one;
    if (run_go(r) < 0)
        fail_msg("order %d: %s", (int)(seed % 3), r->err->text);
    *found += check(r);
    json_t *result = run_result(r);
    assert_string_equal(json_string_value(json_object_get(result, "products")), "grouped"); /* what the library can */
    json_decref(result);
    const double error = r->machine.max_error;
    test_close_run(r);
    json_decref(spec);
    assert_int_equal(standin_left(), 0);
    return error;
}

/* From 2 to 8 ranks, with rows of odd numbers of bytes too. */
static void a_task_is_two_calls(void **state)
{
    for (size_t i = 0; i < 4 * sizeof shapes / sizeof *shapes; i++) {
        const bool half = i % 2, odd = i / 2 % 2;
        int many = 0;
        json_t *spec = cuda_spec(*state, shapes[i / 4]);
        test_policy(spec, "dispatch", i % 3 ? "flat" : "node-dedup");
        test_set(spec, "model", "d_model", json_integer(odd ? 22 : 24));
        test_set(spec, "model", "d_expert", json_integer(odd && i / 4 % 2 ? 15 : 16));
        test_set(spec, "model", "precision", json_string(half ? "bf16" : "fp32"));
        const double error = run_checked(spec, i, false, assert_calls, &many);
        assert_true(half ? error > 1e-4 && error < 1e-2 : error > 1e-9 && error < 1e-5);
        assert_true(many >= 2); /* tasks with several experts */
    }
}

/* ---- with an older library ---- */

static int assert_singles(const struct run *r)
{
    const struct standin_call *all;
    (void)r;
    for (size_t i = 0, n = standin_blas(&all); i < n; i++)
        assert_int_equal(all[i].n, 1);
    assert_null(strstr(standin_calls(), "gemms of"));
    assert_non_null(strstr(standin_calls(), " gemm "));
    return 0;
}

static void one_by_one(void **state)
{
    int none = 0;
    for (uint64_t i = 0; i < 3; i++) {
        const double error = run_checked(cuda_spec(*state, shapes[2]), i, true, assert_singles, &none);
        assert_true(error > 1e-9 && error < 1e-5);
    }
}

/* ---- lists by hand ---- */

static void lists(void **state)
{
    struct cuda_products p = { 0 };
    struct err e = { 0 };
    const float a[] = { 1, 2, 3, 4, 5, 6 }, b[] = { 1, 0, 2, 0, 1, 1 }, zero[4] = { 0 };
    float *c[3];
    struct cuda_stream s = { 0 };
    (void)state;
    standin_open(STANDIN_FIRST, 0, -1);
    assert_int_equal(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cublasCreate(&s.blas), CUBLAS_STATUS_SUCCESS);
    assert_int_equal(cublasSetStream(s.blas, s.stream), CUBLAS_STATUS_SUCCESS);
    for (int i = 0; i < 3; i++)
        assert_int_equal(cudaMalloc((void **)&c[i], sizeof zero), cudaSuccess);
    /* (1 2 3; 4 5 6) (1 0; 2 0; 1 1) = (8 3; 20 6), (1 2; 3 4) (1 0; 2 0) = (5 0; 11 0) */
    assert_int_equal(cuda_products_call(&p, false, &e), 0);
    test_ok(cuda_products_add(&p, &(struct cuda_product){ 2, 2, 3, a, b, c[0], NULL }, 0, &e), &e);
    test_ok(cuda_products_add(&p, &(struct cuda_product){ 2, 2, 2, a, b, c[1], NULL }, 0, &e), &e);
    assert_int_equal(cuda_products_call(&p, false, &e), 1);
    test_ok(cuda_products_add(&p, &(struct cuda_product){ 1, 2, 3, a + 3, b, c[2], NULL }, 0, &e), &e);
    test_ok(cuda_products_upload(&p, 0, &e), &e);
    for (int one = 0; one < 2; one++) {
        static const float expected[3][4] = { { 8, 3, 20, 6 }, { 5, 0, 11, 0 }, { 20, 6, 0, 0 } };
        for (int i = 0; i < 3; i++)
            assert_int_equal(cudaMemcpy(c[i], zero, sizeof zero, cudaMemcpyHostToDevice), cudaSuccess);
        p.one_by_one = one;
        for (int call = 0; call < 2; call++)
            test_ok(cuda_products_run(&p, call, false, &s, 0, &e), &e);
        assert_int_equal(cudaStreamSynchronize(s.stream), cudaSuccess);
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 4; j++)
                assert_true(fabsf(c[i][j] - expected[i][j]) < 1e-6f);
    }
    assert_non_null(strstr(standin_calls(), "s0 gemms of 2 40\ns0 gemm 12\ns0 gemm 24\ns0 gemm 16\ns0 gemm 12\n"));
    cuda_products_free(&p);
    for (int i = 0; i < 3; i++)
        cudaFree(c[i]);
    cublasDestroy(s.blas);
    cudaStreamDestroy(s.stream);
    assert_int_equal(standin_left(), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_task_is_two_calls, scratch_make, scratch_remove),
        cmocka_unit_test_setup_teardown(one_by_one, scratch_make, scratch_remove),
        cmocka_unit_test(lists),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
