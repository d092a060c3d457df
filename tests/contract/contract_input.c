/* SPDX-License-Identifier: Apache-2.0
 * contract_input.c - sizes, batches and comparisons for the contract suite. */
#include "contract.h"

const struct contract_size contract_sizes[] = {
    /* tokens, layers, experts, top_k, devices, nodes */
    {0, 2, 8, 2, 4, 2},    /* no tokens */
    {1, 1, 1, 1, 1, 1},    /* one of everything */
    {24, 2, 8, 8, 4, 2},   /* K = E */
    {33, 3, 16, 2, 1, 1},  /* one device */
    {64, 4, 32, 4, 8, 2},
    {3, 2, 64, 6, 8, 4},   /* devices without tokens */
};
const int contract_n_sizes = sizeof contract_sizes / sizeof *contract_sizes;

static void *must(void *p)
{
    if (p == NULL)
        abort();
    return p;
}

/* Width of hidden states; token ids; of dimensions that a plugin names with letters of its own. */
enum { HIDDEN = 64, VOCABULARY = 1000, OTHER = 16 };

/* P, the largest factor of n that is not above its root: Q is the other one. */
static int64_t factor_of(int64_t n)
{
    int64_t p = 1;
    for (int64_t i = 2; i * i <= n; i++)
        p = n % i == 0 ? i : p;
    return p;
}

/* A size that a tensor declares: a number, a letter that the model fixes, or another letter. */
static int64_t declared_size(const char *letter, const struct contract_size *size)
{
    if (*letter >= '0' && *letter <= '9')
        return strtoll(letter, NULL, 10);
    return *letter == 'L' ? size->n_layers : *letter == 'E' ? size->n_experts : *letter == 'K' ? size->top_k
         : *letter == 'P' ? factor_of(size->n_experts) : *letter == 'Q' ? size->n_experts / factor_of(size->n_experts)
         : *letter == 'H' ? HIDDEN : *letter == 'V' ? VOCABULARY : OTHER;
}

/* Learned tensors for a plugin: numbers in [-0.5, 0.5) in the shapes that its parameters declare. `text`: settings that
 * name them. They live as long as the host. */
static void give_tensors(struct policy_host *host, const struct moe_plugin *plugin, const struct contract_size *size,
                         char *text, size_t room)
{
    const struct moe_env env = {.seed = 78};
    struct moe_tensor *tensor = must(host->host.alloc(&host->env, 16, sizeof *tensor));
    for (const struct moe_param *p = plugin->params; p != NULL && p->name != NULL; p++) {
        if (p->type != MOE_TENSOR)
            continue;
        struct moe_tensor *x = &tensor[host->n_tensors];
        int64_t n = 1;
        const char *letter = p->def_text;
        assert_true(host->n_tensors < 16);
        for (;; letter++) {
            assert_true(x->n_dims < 4);
            x->shape[x->n_dims] = declared_size(letter, size);
            n *= x->shape[x->n_dims++];
            if ((letter = strchr(letter, ',')) == NULL)
                break;
        }
        assert_true(n > 0);
        float *data = must(host->host.alloc(&host->env, (size_t)n, sizeof *data));
        for (int64_t i = 0; i < n; i++)
            data[i] = (float)(moe_unit(moe_rand(&env, (uint32_t)host->n_tensors, 0, 0, i)) - 0.5);
        x->data = data;
        size_t used = strlen(text);
        snprintf(text + used, room - used, "%s%s=#%d", used > 0 ? " " : "", p->name, host->n_tensors++);
    }
    host->tensor = tensor;
}

void contract_start(struct policy *policy, struct policy_host *host, const struct moe_plugin *plugin,
                    const struct contract_size *size, int64_t cache_objects)
{
    struct policy_shape shape = {size->n_layers, size->n_experts, size->top_k, size->n_devices, size->n_nodes,
                                 cache_objects, 12345};
    char settings[256] = "";
    policy_host_open(host, &shape);
    if (plugin->needs & MOE_NEEDS_TENSORS)
        give_tensors(host, plugin, size, settings, sizeof settings);
    if (policy_start(policy, host, plugin, settings) != MOE_OK)
        fail_msg("init: %s", host->n_failures > 0 ? host->failure : "failed without saying why");
}

void contract_stop(struct policy *policy)
{
    policy_stop(policy);
    policy_host_close(policy->host);
}

/* Bits that depend on the token (request, position), the field and the index in it. */
static uint64_t token_bits(int32_t request, int32_t position, uint32_t field, int64_t i)
{
    const struct moe_env env = {.seed = 77};
    return moe_rand(&env, field, request, position, i);
}

/* k different experts; weights that add up to 1. */
static void token_routes(struct moe_routes *r, int32_t token, int32_t request, int32_t position, uint32_t field,
                         int32_t n_experts, int32_t k)
{
    int32_t *expert = must(calloc((size_t)n_experts, sizeof *expert));
    for (int32_t e = 0; e < n_experts; e++)
        expert[e] = e;
    for (int32_t i = 0; i < k; i++) {
        /* the smaller of two draws: some experts are more popular */
        uint64_t a = token_bits(request, position, field, 2 * i) % (uint64_t)(n_experts - i);
        uint64_t b = token_bits(request, position, field, 2 * i + 1) % (uint64_t)(n_experts - i);
        int32_t at = i + (int32_t)(a < b ? a : b), swap = expert[at];
        expert[at] = expert[i];
        expert[i] = swap;
        policy_routes_push(r, token, expert[i], 2.0f * (float)(k - i) / (float)(k * (k + 1)));
    }
    free(expert);
}

void contract_batch_make(struct contract_batch *b, const struct contract_size *size, int32_t step, int32_t layer,
                         int32_t n_requests, int32_t only_request)
{
    int32_t n_hidden = HIDDEN, n = 0, n_experts = size->n_experts;
    size_t room = (size_t)size->n_tokens + 1, wide = room * (size_t)n_experts;
    uint32_t field = (uint32_t)(step * size->n_layers + layer) * 8;
    memset(b, 0, sizeof *b);
    int32_t **ints[] = {&b->token_id, &b->position, &b->request, &b->device, &b->label};
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
        *ints[i] = must(calloc(room, sizeof **ints[i]));
    b->logits = must(calloc(wide, sizeof *b->logits));
    b->previous_logits = must(calloc(wide, sizeof *b->previous_logits));
    b->scores = must(calloc(wide, sizeof *b->scores));
    b->hidden = must(calloc(room * (size_t)n_hidden, sizeof *b->hidden));
    b->importance = must(calloc(room, sizeof *b->importance));
    for (int32_t t = 0; t < size->n_tokens; t++)
        n += only_request < 0 || t % n_requests == only_request;
    policy_routes_init(&b->recorded, n);
    policy_routes_init(&b->previous, n);
    for (int32_t t = 0, at = 0; t < size->n_tokens; t++) {
        int32_t request = t % n_requests, position = t / n_requests;
        if (only_request >= 0 && request != only_request)
            continue;
        b->request[at] = request;
        b->position[at] = position;
        b->token_id[at] = (int32_t)(token_bits(request, position, 1, 0) % VOCABULARY);
        b->label[at] = request % 3;
        b->device[at] = request % size->n_devices;
        b->importance[at] = (float)moe_unit(token_bits(request, position, 2, 0));
        for (int32_t e = 0; e < n_experts; e++) {
            int64_t i = (int64_t)at * n_experts + e;
            b->logits[i] = (float)(4 * moe_unit(token_bits(request, position, field + 3, e)) - 3.0 * e / n_experts);
            b->previous_logits[i] = (float)(4 * moe_unit(token_bits(request, position, field + 4, e)));
        }
        moe_softmax(b->logits + (int64_t)at * n_experts, n_experts, b->scores + (int64_t)at * n_experts);
        for (int32_t i = 0; i < n_hidden; i++)
            b->hidden[at * n_hidden + i] = (float)(moe_unit(token_bits(request, position, field + 5, i)) - 0.5);
        token_routes(&b->recorded, at, request, position, field + 6, n_experts, size->top_k);
        token_routes(&b->previous, at, request, position, field + 7, n_experts, size->top_k);
        at++;
    }
    b->batch = (struct moe_batch){
        .step = step, .layer = layer, .phase = MOE_DECODE, .n_tokens = n, .n_experts = n_experts,
        .top_k = size->top_k, .n_hidden = n_hidden, .router_logits = b->logits, .recorded = &b->recorded,
        .token_id = b->token_id, .position = b->position, .request = b->request, .device = b->device,
        .label = b->label, .hidden = b->hidden, .importance = b->importance, .previous = &b->previous,
        .previous_logits = b->previous_logits,
    };
}

void contract_batch_free(struct contract_batch *b)
{
    policy_routes_free(&b->recorded);
    policy_routes_free(&b->previous);
    free(b->token_id);
    free(b->position);
    free(b->request);
    free(b->device);
    free(b->label);
    free(b->logits);
    free(b->hidden);
    free(b->importance);
    free(b->previous_logits);
    free(b->scores);
}

/* What a token may have once: an expert, a slot, an expert of one merged expert. */
static int64_t key_of(const struct moe_routes *r, int64_t i, int32_t n_ids)
{
    return r->form == MOE_TOKENS ? r->expert[i] : r->form == MOE_SLOTS ? r->slot[i]
                                                : (int64_t)r->slot[i] * n_ids + r->expert[i];
}

/* A slot has one expert, and dispatch weights that are shares of its tokens. A merged expert is one sum of experts for
 * all its tokens, as heavy together as one. A half is left out or repeated, and who leaves experts out has none. */
static void check_forms(const struct moe_routes *r, int32_t n_tokens)
{
    int32_t *expert = must(calloc((size_t)r->n_slots + 1, sizeof *expert));
    double *sum = must(calloc((size_t)r->n_slots + 1, sizeof *sum));
    assert_true(r->form == MOE_SLOTS || r->form == MOE_MERGED || (r->slot == NULL && r->n_slots == 0));
    for (int32_t t = 0; r->form != MOE_TOKENS && t < n_tokens; t++) {
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            assert_true(r->slot[i] >= 0 && r->slot[i] < r->n_slots && r->weight[i] >= 0);
            assert_true(r->form == MOE_MERGED || expert[r->slot[i]] == 0 || expert[r->slot[i]] == r->expert[i] + 1);
            expert[r->slot[i]] = r->expert[i] + 1;
            sum[r->slot[i]] += (double)r->weight[i];
        }
        for (int32_t s = 0; r->form == MOE_MERGED && s < r->n_slots; s++) {
            assert_true(sum[s] <= 0 || fabs(sum[s] - 1) <= 1e-5);
            sum[s] = 0;
        }
    }
    for (int32_t s = 0; r->form == MOE_SLOTS && s < r->n_slots; s++)
        assert_true(fabs(sum[s] - 1) <= 1e-5);
    for (int32_t t = 0; t < n_tokens; t++) {
        const int skips = r->skip != NULL ? r->skip[t] : 0, again = r->again != NULL ? r->again[t] : 0;
        assert_true(skips >= 0 && skips <= 3 && again >= 0 && again <= 3 && (skips & again) == 0);
        assert_true(!(skips & MOE_HALF_EXPERTS) || r->offset[t + 1] == r->offset[t]);
    }
    free(expert);
    free(sum);
}

void contract_check_routes(const struct moe_routes *r, int32_t n_tokens, int32_t n_experts)
{
    const int32_t n_ids = n_experts + r->n_free;
    const int64_t n_keys = (int64_t)n_ids * (r->n_slots > 0 ? r->n_slots : 1);
    uint8_t *seen = must(calloc((size_t)n_keys + 1, 1));
    assert_true(r->n >= 0 && r->n <= r->capacity && r->n_free >= 0);
    assert_int_equal(r->offset[0], 0);
    assert_int_equal(r->offset[n_tokens], r->n);
    check_forms(r, n_tokens);
    for (int32_t t = 0; t < n_tokens; t++) {
        assert_true(r->offset[t] <= r->offset[t + 1]);
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++) {
            if (r->expert[i] < 0 || r->expert[i] >= n_ids)
                fail_msg("token %d: expert %d of %d", t, r->expert[i], n_ids);
            if (seen[key_of(r, i, n_ids)]++)
                fail_msg("token %d: expert %d twice", t, r->expert[i]);
            assert_true(isfinite(r->weight[i]));
            assert_true(r->combine == NULL || isfinite(r->combine[i]));
        }
        for (int64_t i = r->offset[t]; i < r->offset[t + 1]; i++)
            seen[key_of(r, i, n_ids)] = 0;
    }
    free(seen);
}

void contract_note(struct contract_notes *notes, const void *data, size_t bytes)
{
    if (notes->n + bytes > notes->room) {
        notes->room = 2 * (notes->n + bytes);
        notes->bytes = must(realloc(notes->bytes, notes->room));
    }
    if (bytes > 0)
        memcpy(notes->bytes + notes->n, data, bytes);
    notes->n += bytes;
}

void contract_note_routes(struct contract_notes *notes, const struct moe_routes *r)
{
    contract_note(notes, &r->n, sizeof r->n);
    contract_note(notes, r->offset, ((size_t)r->n_tokens + 1) * sizeof *r->offset);
    contract_note(notes, r->expert, (size_t)r->n * sizeof *r->expert);
    contract_note(notes, r->weight, (size_t)r->n * sizeof *r->weight);
    contract_note(notes, &r->form, sizeof r->form);
    contract_note(notes, &r->n_slots, sizeof r->n_slots);
    if (r->combine != NULL)
        contract_note(notes, r->combine, (size_t)r->n * sizeof *r->combine);
    if (r->slot != NULL)
        contract_note(notes, r->slot, (size_t)r->n * sizeof *r->slot);
    if (r->skip != NULL)
        contract_note(notes, r->skip, (size_t)r->n_tokens);
    if (r->again != NULL)
        contract_note(notes, r->again, (size_t)r->n_tokens);
}

void contract_same(struct contract_notes *a, struct contract_notes *b)
{
    assert_int_equal(a->n, b->n);
    if (a->n > 0 && memcmp(a->bytes, b->bytes, a->n) != 0)
        fail_msg("two runs with the same seed and input decided differently");
    free(a->bytes);
    free(b->bytes);
    memset(a, 0, sizeof *a);
    memset(b, 0, sizeof *b);
}
