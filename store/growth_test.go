package store

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// However often one secret is set, and whoever reads meanwhile, however slowly,
// the file keeps its size: pages that are free are used again. By default it is
// set 10,000 times; $WORKSPACED_TEST_CHANGES says otherwise.
func TestFile_StaysBounded(t *testing.T) {
	changes := 10_000
	if n, err := strconv.Atoi(os.Getenv("WORKSPACED_TEST_CHANGES")); err == nil {
		changes = n
	}
	h := newHarness(t)
	h.cfg.OnCommit = nil
	h.reopen()
	h.db.NoSync = true // it is not about what is durable
	h.create("a")
	h.create("b")

	// Readers who take all the time in the world: a list whose filter is slow, a
	// watcher that does not come back for the next page.
	slow := make(chan struct{})
	waiting := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		ws, _, err := h.ListWorkspaces("", 0, func(w *Workspace) bool {
			if w.ID == "a" {
				close(waiting)
				<-slow
			}
			return true
		})
		if err != nil || len(ws) != 2 {
			t.Errorf("got %d, %v", len(ws), err)
		}
	})
	<-waiting
	watcher := &follower{h: h}
	watcher.known = map[string]Workspace{}
	watcher.apply(must(h.Feed(0, 1))(t))

	set := func(from, to int) int64 {
		const callers = 64
		var wg sync.WaitGroup
		for caller := range callers {
			wg.Go(func() {
				for n := from + caller; n < to; n += callers {
					text := fmt.Sprint(n, strings.Repeat("x", n*997%3000))
					must(h.UpdateSecrets(ctx, in("a"), set("K", text), Options{}))(t)
				}
			})
		}
		wg.Wait()
		return must(os.Stat(h.cfg.Path))(t).Size()
	}
	first := set(0, changes/10)
	last := set(changes/10, changes)
	stats := h.db.Stats()
	t.Logf("%d changes, %d commits: %d bytes after a tenth of them, %d in the end", changes, h.ended(), first, last)
	if last > first || last > 4<<20 {
		t.Errorf("the file has grown from %d to %d bytes", first, last)
	}
	if stats.OpenTxN != 0 {
		t.Errorf("%d readers hold a transaction", stats.OpenTxN)
	}
	if w := must(h.Workspace("a"))(t); w.Generation != int64(changes)+1 {
		t.Errorf("generation %d", w.Generation)
	}
	close(slow)
	readers.Wait()
	watcher.follow(1)
	watcher.check()
	h.reopen()
}
