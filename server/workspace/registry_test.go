package workspace

import (
	"fmt"
	"sync"
	"testing"
	"unsafe"
)

// While actors come and go, those that stay are found: at once, or by who looks
// again with the lock held.
func TestRegistry(t *testing.T) {
	var (
		r     registry
		mu    sync.Mutex
		group sync.WaitGroup
	)
	r.init()
	add := func(id string) *actor {
		mu.Lock()
		defer mu.Unlock()
		a := newActor(nil, id)
		r.add(a)
		return a
	}
	const n = 3000
	stays := make([]*actor, n)
	ids := make([]string, n) // of all lengths, and no pointers of the actors'
	for i := range stays {
		ids[i] = fmt.Sprintf("%0*d", 4+i%40, i)
	}
	done := make(chan struct{})
	for range 2 {
		group.Go(func() {
			for {
				for i, id := range ids {
					if a := r.find(id); a != nil && a.id != id {
						t.Errorf("find(%s) = %s", id, a.id)
					} else if i%100 == 0 && a == nil {
						mu.Lock()
						if stays[i] != nil && r.find(id) != stays[i] {
							t.Errorf("%s is not found", id)
						}
						mu.Unlock()
					}
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for i, id := range ids {
		a := add(id)
		goes := add("goes-" + id)
		mu.Lock()
		stays[i] = a
		r.remove(goes)
		mu.Unlock()
	}
	close(done)
	group.Wait()
	if r.n != n || len(*r.buckets.Load()) < n {
		t.Errorf("%d actors in %d buckets, want %d", r.n, len(*r.buckets.Load()), n)
	}
	count := 0
	r.each(func(*actor) { count++ })
	if count != n {
		t.Errorf("each has %d, want %d", count, n)
	}
	for i, id := range ids {
		if r.find(id) != stays[i] || r.find("goes-"+id) != nil {
			t.Errorf("find(%s) = %v", id, r.find(id))
		}
	}
}

// Ids that differ little are spread over all buckets.
func TestRegistryHash(t *testing.T) {
	var r registry
	r.init()
	for _, form := range []string{"w%d", "workspace-%06d", "%06d-in-front-of-a-long-name-that-is-always-the-same", "a-name-that-fills-its-32-bytes-%d"} {
		const ids, buckets = 64 << 10, 4 << 10
		var count [buckets]int
		for i := range ids {
			count[r.hash(fmt.Sprintf(form, i))%buckets]++
		}
		for b, n := range count {
			if n > 60 { // 16 on average; chance has no bucket beyond that in ages
				t.Errorf("%s: %d ids in bucket %d", form, n, b)
				break
			}
		}
	}
}

// An actor that sleeps for long keeps its id, and not the row of the record that
// the id was read from.
func TestActor_IDIsItsOwn(t *testing.T) {
	row := `{"id":"workspace-1","uid":"..."}`
	id := row[len(`{"id":"`):][:len("workspace-1")]
	if a := newActor(nil, id); a.id != id || unsafe.StringData(a.id) == unsafe.StringData(id) {
		t.Error("the id is a part of the row")
	}
}
