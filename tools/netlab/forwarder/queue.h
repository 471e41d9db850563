/* Packets on their way: a binary heap by the time of their next event; equal times in order of
 * arrival. */
static struct pkt **heap;
static size_t heap_n, heap_cap;
static u64 next_seq;

static int before(const struct pkt *a, const struct pkt *b)
{
    return a->t < b->t || (a->t == b->t && a->seq < b->seq);
}
static void push(struct pkt *p)
{
    if (heap_n == heap_cap) {
        heap_cap = heap_cap ? heap_cap * 2 : 4096;
        heap = realloc(heap, heap_cap * sizeof *heap);
        if (!heap) abort();
    }
    p->seq = next_seq++;
    size_t i = heap_n++;
    while (i) {
        size_t up = (i - 1) / 2;
        if (!before(p, heap[up])) break;
        heap[i] = heap[up];
        i = up;
    }
    heap[i] = p;
}
static struct pkt *pop(void)
{
    struct pkt *top = heap[0], *p = heap[--heap_n];
    size_t i = 0;
    for (;;) {
        size_t c = 2 * i + 1;
        if (c >= heap_n) break;
        if (c + 1 < heap_n && before(heap[c + 1], heap[c])) c++;
        if (!before(heap[c], p)) break;
        heap[i] = heap[c];
        i = c;
    }
    if (heap_n) heap[i] = p;
    return top;
}
