/* Address translation and stateful filtering: one table of mappings per translating host. */
/* ----------------------------------------------------------- checksums */
static u16 get16(const u8 *p) { return (u16)(p[0] << 8 | p[1]); }
static void put16(u8 *p, u16 v) { p[0] = (u8)(v >> 8); p[1] = (u8)v; }
static u32 get32(const u8 *p) { return (u32)get16(p) << 16 | get16(p + 2); }
static void put32(u8 *p, u32 v) { put16(p, (u16)(v >> 16)); put16(p + 2, (u16)v); }
static u16 fold(u32 s) { while (s >> 16) s = (s & 0xffff) + (s >> 16); return (u16)s; }

/* Replace 16-bit word `from` by `to` in the sum stored at p.  A "partial" field
 * (checksum offload) holds the plain pseudo-header sum, a full one its complement. */
static void csum_adj(u8 *p, u16 from, u16 to, int partial)
{
    u32 s = partial ? get16(p) : (u16)~get16(p);
    u16 r = fold(s + (u16)~from + to);
    put16(p, partial ? r : (u16)~r);
}
static void ip_csum(u8 *ip, int hl)
{
    u32 s = 0;
    put16(ip + 10, 0);
    for (int i = 0; i < hl; i += 2) s += get16(ip + i);
    put16(ip + 10, (u16)~fold(s));
}

/* ----------------------------------------------------------------- NAT */
static int proto_slot(u8 proto) { return proto == 6 ? 0 : proto == 17 ? 1 : proto == 1 ? 2 : -1; }
static u32 mix(u32 a, u32 b, u32 c) { u32 h = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u; return (h ^ h >> 15) % NHASH; }
/* `used` may lie a little ahead of `now` (events are handled up to SLOP_NS early) */
static int expired(struct nat *n, u8 proto, u64 used, u64 now) { return now > used && now - used > (proto == 6 ? n->tcp_ns : n->udp_ns); }

/* Locate the port-like field of the packet; -1 if this packet has none. */
static int l4_find(u8 *ip, int len, u8 *proto, int *src_off, int *dst_off, int *sum_off)
{
    int hl = (ip[0] & 15) * 4;
    if (hl < 20 || len < hl + 8 || (get16(ip + 6) & 0x1fff)) return -1; /* later fragments: no ports */
    *proto = ip[9];
    switch (ip[9]) {
    case 6: if (len < hl + 20) return -1; *src_off = hl; *dst_off = hl + 2; *sum_off = hl + 16; return 0;
    case 17: *src_off = hl; *dst_off = hl + 2; *sum_off = hl + 6; return 0;
    case 1: if (ip[hl] != 8 && ip[hl] != 0) return -1;       /* echo only */
            *src_off = *dst_off = hl + 4; *sum_off = hl + 2; return 0;
    }
    return -1;
}
static void rewrite(u8 *ip, int addr_off, u32 addr, int port_off, u16 port, int sum_off, u8 proto, int partial)
{
    u8 a[4];
    memcpy(a, &addr, 4);
    u16 oldp = get16(ip + port_off);
    int l4 = !(proto == 17 && !partial && get16(ip + sum_off) == 0);
    for (int i = 0; i < 4; i += 2) {
        u16 from = get16(ip + addr_off + i), to = get16(a + i);
        csum_adj(ip + 10, from, to, 0);
        if (l4 && proto != 1) csum_adj(ip + sum_off, from, to, partial);
    }
    memcpy(ip + addr_off, a, 4);
    if (oldp != port) {
        if (l4 && !partial) csum_adj(ip + sum_off, oldp, port, 0);
        put16(ip + port_off, port);
    }
    if (l4 && proto == 17 && !partial && get16(ip + sum_off) == 0) put16(ip + sum_off, 0xffff);
}
static void map_drop(struct nat *n, struct map *m)
{
    struct map **pp = &n->out[mix(m->proto, m->iport, m->rip ^ m->rport)];
    while (*pp && *pp != m) pp = &(*pp)->next_out;
    if (*pp) *pp = m->next_out;
    n->in[proto_slot(m->proto)][m->eport] = NULL;
    free(m);
}
static void permit(struct nat *n, u8 proto, u16 eport, u32 rip, u16 rport, u64 now)
{
    struct perm **pp = &n->perm[mix(proto ^ eport, rip, rport)], *q;
    while ((q = *pp)) {
        if (q->proto == proto && q->eport == eport && q->rip == rip && q->rport == rport) { q->used = now; return; }
        if (expired(n, q->proto, q->used, now)) { *pp = q->next; free(q); continue; }
        pp = &q->next;
    }
    q = calloc(1, sizeof *q);
    q->proto = proto; q->eport = eport; q->rip = rip; q->rport = rport; q->used = now;
    *pp = q;
}
static int permitted(struct nat *n, u8 proto, u16 eport, u32 rip, u16 rport, u64 now)
{
    for (struct perm *q = n->perm[mix(proto ^ eport, rip, rport)]; q; q = q->next)
        if (q->proto == proto && q->eport == eport && q->rip == rip && q->rport == rport) {
            if (expired(n, proto, q->used, now)) return 0;
            q->used = now;
            return 1;
        }
    return 0;
}
/* Outbound: make or refresh the mapping, rewrite the source. */
static int nat_out(struct host *h, u8 *ip, int len, int partial, u64 now)
{
    struct nat *n = h->nat;
    u8 proto; int so, dof, su;
    if (l4_find(ip, len, &proto, &so, &dof, &su)) return -1;
    int slot = proto_slot(proto);
    if (slot < 0) return -1;
    u16 iport = get16(ip + so), rport = proto == 1 ? 0 : get16(ip + dof), eport;
    u32 rip;
    memcpy(&rip, ip + 16, 4);
    if (h->kind == NAT_FIREWALL) {
        eport = iport;
    } else {
        u32 krip = h->kind == NAT_SYMMETRIC ? rip : 0;
        u16 krport = h->kind == NAT_SYMMETRIC ? rport : 0;
        u32 b = mix(proto, iport, krip ^ krport);
        struct map *m = n->out[b];
        while (m && !(m->proto == proto && m->iport == iport && m->rip == krip && m->rport == krport)) m = m->next_out;
        if (m && expired(n, proto, m->used, now)) { map_drop(n, m); m = NULL; }
        if (!m) {
            u16 cand = iport;
            int tries = 0;
            if (!n->preserve || h->kind == NAT_SYMMETRIC) cand = (u16)(20000 + rnd64() % 45000);
            for (; n->in[slot][cand]; cand = (u16)(20000 + rnd64() % 45000)) {
                struct map *o = n->in[slot][cand];
                if (expired(n, proto, o->used, now)) { map_drop(n, o); break; }
                if (++tries > 1000) return -1;
            }
            m = calloc(1, sizeof *m);
            m->proto = proto; m->iport = iport; m->eport = cand; m->rip = krip; m->rport = krport;
            m->next_out = n->out[b];
            n->out[b] = m;
            n->in[slot][cand] = m;
        }
        m->used = now;
        eport = m->eport;
    }
    permit(n, proto, eport, rip, rport, now);
    rewrite(ip, 12, h->pub, so, eport, su, proto, partial);
    return 0;
}
/* Inbound: find the mapping, filter, rewrite the destination. */
static int nat_in(struct host *h, u8 *ip, int len, int partial, u64 now)
{
    struct nat *n = h->nat;
    u8 proto; int so, dof, su;
    if (l4_find(ip, len, &proto, &so, &dof, &su)) return -1;
    u16 eport = get16(ip + dof), rport = proto == 1 ? 0 : get16(ip + so), iport = eport;
    u32 rip;
    memcpy(&rip, ip + 12, 4);
    if (h->kind != NAT_FIREWALL) {
        int slot = proto_slot(proto);
        struct map *m = slot < 0 ? NULL : n->in[slot][eport];
        if (!m || expired(n, proto, m->used, now)) return -1;
        if (h->kind != NAT_FULLCONE && !permitted(n, proto, eport, rip, rport, now)) return -1;
        m->used = now;
        iport = m->iport;
    } else if (!permitted(n, proto, eport, rip, rport, now)) {
        return -1;
    }
    rewrite(ip, 16, h->priv, dof, iport, su, proto, partial);
    return 0;
}
