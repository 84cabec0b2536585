package workspace

import (
	"math/bits"
	"math/rand/v2"
	"sync/atomic"
)

// registry finds actors by id, for kicks: find takes no lock and writes nothing,
// so that kicks from many goroutines do not get into each other's way. Its owner's
// lock is held for add and remove.
//
// It is a hash table whose chains run through the actors. While it grows, a find
// may follow a link into another chain and miss an actor that is there: who finds
// none looks again with the lock held.
type registry struct {
	seed    [2]uint64 // ids are callers' choice, and their chains shall not be
	buckets atomic.Pointer[[]atomic.Pointer[actor]]
	n       int
}

const minBuckets = 64

func (r *registry) init() {
	r.seed = [2]uint64{rand.Uint64(), rand.Uint64()}
	buckets := make([]atomic.Pointer[actor], minBuckets)
	r.buckets.Store(&buckets)
}

func (r *registry) find(id string) *actor {
	for a := bucket(*r.buckets.Load(), r.hash(id)).Load(); a != nil; a = a.next.Load() {
		if a.id == id {
			return a
		}
	}
	return nil
}

func (r *registry) add(a *actor) {
	if r.n++; r.n > len(*r.buckets.Load()) {
		r.grow()
	}
	link(*r.buckets.Load(), r.hash(a.id), a)
}

func (r *registry) remove(a *actor) {
	at := bucket(*r.buckets.Load(), r.hash(a.id))
	for at.Load() != a {
		at = &at.Load().next
	}
	at.Store(a.next.Load()) // a keeps its link: a find may stand there
	r.n--
}

func (r *registry) grow() {
	bigger := make([]atomic.Pointer[actor], 2*len(*r.buckets.Load()))
	r.each(func(a *actor) { link(bigger, r.hash(a.id), a) })
	r.buckets.Store(&bigger)
}

// each calls do with every actor; do may link it elsewhere.
func (r *registry) each(do func(*actor)) {
	buckets := *r.buckets.Load()
	for i := range buckets {
		for a := buckets[i].Load(); a != nil; {
			next := a.next.Load()
			do(a)
			a = next
		}
	}
}

// bucket is the one of the hash; their number is a power of two.
func bucket(buckets []atomic.Pointer[actor], hash uint64) *atomic.Pointer[actor] {
	return &buckets[hash&uint64(len(buckets)-1)]
}

func link(buckets []atomic.Pointer[actor], hash uint64, a *actor) {
	at := bucket(buckets, hash)
	a.next.Store(at.Load())
	at.Store(a)
}

// hash multiplies the id's words with each other and the seed, as hash/maphash
// does on machines without instructions for it; what calls that takes longer than
// this does in all.
func (r *registry) hash(id string) uint64 {
	h := r.seed[0] ^ uint64(len(id))
	for ; len(id) > 16; id = id[16:] {
		h = mix(word(id)^r.seed[1], word(id[8:])^h)
	}
	if len(id) >= 8 { // the two words overlap where there are not 16 bytes
		return mix(word(id)^r.seed[1], word(id[len(id)-8:])^h)
	}
	var rest uint64
	for i := range len(id) {
		rest = rest<<8 | uint64(id[i])
	}
	return mix(rest^r.seed[1], h)
}

func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// word is the first eight bytes of s; the compiler makes one load of it.
func word(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}
