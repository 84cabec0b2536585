package sim

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"time"
)

// dice draw. Each thing that is drawn has dice of its own, made from the seed and
// the thing's name: a draw more or less in one place changes nothing elsewhere,
// and it does not matter who draws first.
type dice struct{ *rand.Rand }

// roll returns the dice for a thing, named by words and a number.
func roll(seed uint64, n int, words ...string) dice {
	h := fnv.New64a()
	for _, w := range words {
		_, _ = h.Write([]byte(w))
		_, _ = h.Write([]byte{0})
	}
	_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(n)))
	return dice{rand.New(rand.NewPCG(seed, h.Sum64()))}
}

// chance is true in one of n cases.
func (d dice) chance(n int) bool { return d.IntN(n) == 0 }

// between returns a duration from lo up to hi.
func (d dice) between(lo, hi time.Duration) time.Duration {
	if hi <= lo {
		return lo
	}
	return lo + time.Duration(d.Int64N(int64(hi-lo)))
}

func pick[T any](d dice, list ...T) T { return list[d.IntN(len(list))] }

// weighted is a choice and how often it is made.
type weighted[T any] struct {
	weight int
	value  T
}

func pickWeighted[T any](d dice, list []weighted[T]) T {
	total := 0
	for _, w := range list {
		total += w.weight
	}
	n := d.IntN(total)
	for _, w := range list {
		if n -= w.weight; n < 0 {
			return w.value
		}
	}
	panic("unreachable")
}
