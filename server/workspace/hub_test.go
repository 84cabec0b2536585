package workspace_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

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
			_ = hub.Run(ctx, func() {})
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

// runHub runs the hub until end is called.
func runHub(t *testing.T, hub *workspace.Hub, beat func()) (end func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = hub.Run(ctx, beat)
	}()
	return func() {
		cancel()
		<-done
	}
}

// TestHubBeats: a hub that works says so, with and without something to do; what
// was noted while it did not run is delivered when it does.
func TestHubBeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := workspace.NewHub()
		hint, stop := hub.Watch("")
		defer stop()
		hub.OnCommit([]store.Change{{ID: "a"}})
		beats := 0
		end := runHub(t, hub, func() { beats++ })
		defer func() {
			end()
			if want := 3 + 6; beats < want-1 || beats > want {
				t.Errorf("%d heartbeats in a minute with one change, want about %d", beats, want)
			}
		}()
		synctest.Wait()
		select {
		case <-hint:
		default:
			t.Error("what was noted before is not delivered")
		}
		hub.OnCommit([]store.Change{{ID: "a"}})
		synctest.Wait()
		<-hint
		<-time.After(6*workspace.HubBeat + time.Second) // the bubble's clock
	})
}

// A hub that nobody watches sleeps through commits: its goroutine is not woken.
func TestHubSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := workspace.NewHub()
		beats := 0
		defer runHub(t, hub, func() { beats++ })()
		commit := func(id string) int {
			synctest.Wait()
			before := beats
			hub.OnCommit([]store.Change{{ID: id}})
			synctest.Wait()
			return beats - before
		}
		_, stop := hub.Watch("a")
		if woken, slept := commit("a"), commit("b"); woken != 1 || slept != 0 {
			t.Errorf("woken %d times for what is watched, %d for what is not", woken, slept)
		}
		stop()
		if n := commit("a"); n != 0 {
			t.Errorf("woken %d times for nobody", n)
		}
	})
}
