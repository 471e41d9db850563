/* What the forwarder keeps: hosts, paths between them, packets on their way, translations; and its
 * random numbers. */
#include <linux/if_tun.h>
#include <stdint.h>

#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define MAXH 128               /* hosts */
#define VH ((int)sizeof(struct vnet)) /* offload header in front of each packet */
#define BUFSZ (VH + 65536 + 64)
#define QUANTUM_NS 1000000     /* largest piece of wire time handled as one unit (and RTT / 10) */
#define SLOP_NS 40000          /* events this close are handled now */
#define COMP_NS 60000          /* typical cost of one crossing (wake-up, copies), taken off the delay */
#define BATCH 32               /* packets read from one host before the others get a turn */

struct vnet { u8 flags, gso_type; u16 hdr_len, gso_size, csum_start, csum_offset; } __attribute__((packed));
enum { VF_NEEDS_CSUM = 1 };
enum { VG_NONE = 0, VG_TCP4 = 1, VG_UDP_L4 = 5, VG_ECN = 0x80 };

enum nat_kind { NAT_NONE, NAT_FIREWALL, NAT_FULLCONE, NAT_RESTRICTED, NAT_SYMMETRIC };
static const char *nat_names[] = { "none", "firewall", "full-cone", "restricted", "symmetric" };

struct serial { u64 rate; double ns_per_byte; u64 qlimit, busy; };   /* rate 0: infinite */

struct map {                   /* one translation entry */
    struct map *next_out;
    u64 used;
    u32 rip;                   /* remote end: symmetric only */
    u16 rport, iport, eport;
    u8 proto;
};
struct perm { struct perm *next; u64 used; u32 rip; u16 rport, eport; u8 proto; };
#define NHASH 4096
struct nat {
    struct map *out[NHASH];
    struct map *in[3][65536];
    struct perm *perm[NHASH];
    u64 udp_ns, tcp_ns;
    int preserve;
};

struct host {
    int used, fd, down;
    u32 pub, priv;             /* network order */
    enum nat_kind kind;
    struct nat *nat;
    struct serial up, dn;
    u64 tx_pkts, tx_bytes, rx_pkts, rx_bytes, drop_up, drop_dn, drop_nat, drop_other, werr;
    u64 peak_up, peak_dn;      /* largest backlog seen, bytes */
};
struct path {
    u64 delay, jitter, last;
    double loss;
    struct serial s;
    int down, reorder;
    u64 pkts, bytes, lost, dropped;
};
struct pkt {
    u64 t, seq, spread;
    u32 wire, len;
    u16 src, dst, nseg;
    u8 stage;                  /* 0: about to enter the downlink, 1: to be delivered */
    u8 data[];
};

static u64 rng = 0x9E3779B97F4A7C15ull;
static u64 rnd64(void) { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return rng; }
static double rnd01(void) { return (double)(rnd64() >> 11) / 9007199254740992.0; }
