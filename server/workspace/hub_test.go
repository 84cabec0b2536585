package workspace_test

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

func TestHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := workspace.NewHub()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = hub.Run(ctx)
		}()
		all, stopAll := hub.Watch("")
		a, stopA := hub.Watch("a")
		b, stopB := hub.Watch("b")
		want := func(when string, wantAll, wantA, wantB int) {
			t.Helper()
			synctest.Wait()
			if len(all) != wantAll || len(a) != wantA || len(b) != wantB {
				t.Errorf("%s: hints all %d, a %d, b %d; want %d %d %d", when, len(all), len(a), len(b), wantAll, wantA, wantB)
			}
		}
		hub.OnCommit([]store.Change{{ID: "a"}})
		want("a changed", 1, 1, 0)
		// Nobody reads: nothing blocks, nothing piles up.
		for range 1000 {
			hub.OnCommit([]store.Change{{ID: "a"}, {ID: "b"}})
		}
		want("many changes", 1, 1, 1)
		<-all
		<-a
		<-b
		stopA()
		hub.OnCommit([]store.Change{{ID: "a"}, {ID: "c"}})
		want("a is watched no longer", 1, 0, 0)
		<-all
		stopAll()
		stopB()
		hub.OnCommit([]store.Change{{ID: "a"}, {ID: "b"}})
		want("nobody watches", 0, 0, 0)
		cancel()
		<-done
	})
}
