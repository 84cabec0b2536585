package server_test

import (
	"context"
	"fmt"
	"log/slog"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/servertest"
)

// The tests of overload run in bubbles, where a container takes prepareTime to
// make and everything else no time at all: what a workspace waits, it waits for
// others. The benchmarks beside them measure a real machine.
const (
	prepareTime = 20 * time.Millisecond
	// cycleLimit is how many containers a servertest.Server makes at once.
	cycleLimit = 4
	// fewGoroutines may come and go with connections and timers.
	fewGoroutines = 20
)

// overload runs a test in a bubble, without a log.
func overload(t *testing.T, test func(t *testing.T, h *harness)) {
	t.Helper()
	run(t, func(t *testing.T, h *harness) {
		h.Runtime.OnCall(func(ctx context.Context, c runtimetest.Call) error {
			if c.Method != runtimetest.Prepare {
				return nil
			}
			select {
			case <-time.After(prepareTime):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		test(t, h)
		for _, v := range h.Runtime.Violations() {
			t.Error(v)
		}
	}, servertest.WithLogger(slog.New(slog.DiscardHandler)))
}

// createAll makes workspaces of these ids and waits until they run.
func (h *harness) createAll(ids []string, edits ...func(*workspacev1.CreateWorkspaceRequest)) {
	h.t.Helper()
	var wg sync.WaitGroup
	for part := range slices.Chunk(ids, max(1, len(ids)/16)) {
		wg.Go(func() {
			for _, id := range part {
				req := &workspacev1.CreateWorkspaceRequest{WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: spec()}}
				for _, edit := range edits {
					edit(req)
				}
				if _, err := h.Client.CreateWorkspace(h.t.Context(), req); err != nil {
					h.t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, id := range ids {
		h.WaitGeneration(id, 0)
	}
}

// names returns n ids: prefix-0000 and so on.
func names(prefix string, n int) (ids []string) {
	for i := range n {
		ids = append(ids, fmt.Sprintf("%s-%04d", prefix, i))
	}
	return ids
}

// setAndWait changes a secret and returns how long it takes until a container
// runs with it.
func (h *harness) setAndWait(id, value string) time.Duration {
	h.t.Helper()
	start := time.Now()
	resp := h.set("workspaces/"+id+"/secrets/K", value)
	h.WaitGeneration(id, resp.GetGeneration())
	return time.Since(start)
}

// heapInUse is what is left on the heap when nothing is under way.
func heapInUse() int64 {
	synctest.Wait()
	goruntime.GC()
	goruntime.GC() // pools need two
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestOverload_KicksOfOneWorkspace: 10,000 requests a second for one workspace
// are a cycle after the other and no more, cost no memory, and delay no other
// workspace by anything.
func TestOverload_KicksOfOneWorkspace(t *testing.T) {
	const perMillisecond, duration = 10, 300 * time.Millisecond
	overload(t, func(t *testing.T, h *harness) {
		others := names("other", 4)
		h.createAll(append(names("hot", 1), others...))
		hot := "hot-0000"
		quiet := h.setAndWait(others[0], "quiet")
		heap, goroutines := heapInUse(), goruntime.NumGoroutine()
		uid := h.get("workspaces/" + hot).GetUid()
		before, looksBefore := h.Runtime.Count(runtimetest.Prepare, hot), h.Runtime.Count(runtimetest.List, uid)

		var storm sync.WaitGroup
		var last atomic.Int64 // the newest generation that was acknowledged
		acknowledged := func(generation int64, err error) {
			if err != nil {
				t.Error(err)
			}
			for {
				seen := last.Load()
				if generation <= seen || last.CompareAndSwap(seen, generation) {
					return
				}
			}
		}
		storm.Go(func() {
			for ms := range int(duration / time.Millisecond) {
				for i := range perMillisecond {
					storm.Go(func() {
						if i%2 == 0 {
							resp, err := h.Client.RestartWorkspace(t.Context(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/" + hot})
							acknowledged(resp.GetGeneration(), err)
							return
						}
						resp, err := h.Client.SetSecret(t.Context(), &workspacev1.SetSecretRequest{
							Name:    fmt.Sprintf("workspaces/%s/secrets/K%d", hot, i),
							Payload: &workspacev1.SetSecretRequest_Text{Text: fmt.Sprint(ms)},
						})
						acknowledged(resp.GetGeneration(), err)
					})
				}
				<-time.After(time.Millisecond)
			}
		})
		var slowest time.Duration
		start, n := time.Now(), 0
		for ; time.Since(start) < duration; n++ {
			slowest = max(slowest, h.setAndWait(others[n%len(others)], fmt.Sprint(n)))
		}
		storm.Wait()
		h.WaitGeneration(hot, last.Load())

		kicks := int(duration/time.Millisecond) * perMillisecond
		if got := last.Load(); got != int64(kicks)+1 {
			t.Errorf("generation %d after %d changes", got, kicks)
		}
		// One cycle after the other while it lasts, one for the rest.
		cycles := h.Runtime.Count(runtimetest.Prepare, hot) - before
		if most := int(duration/prepareTime) + 1; cycles > most || cycles < most/2 {
			t.Errorf("%d kicks came to %d cycles, want at most %d", kicks, cycles, most)
		}
		// Nor does each kick cost a look at the container.
		if looks := h.Runtime.Count(runtimetest.List, uid) - looksBefore; looks > 10*cycles {
			t.Errorf("%d kicks came to %d looks in %d cycles", kicks, looks, cycles)
		}
		if n < int(duration/prepareTime) || slowest > quiet {
			t.Errorf("%d changes of others took up to %v each, %v without the storm", n, slowest, quiet)
		}
		// What the Fake remembers of its calls is in it.
		if grown := heapInUse() - heap; grown > 8<<20 {
			t.Errorf("%d kicks left %d KB on the heap", kicks, grown>>10)
		}
		if got := goruntime.NumGoroutine(); got > goroutines+fewGoroutines {
			t.Errorf("%d goroutines, %d before", got, goroutines)
		}
	})
}

// rollout watches what a change of all workspaces does to them.
type rollout struct {
	mu       sync.Mutex
	making   int // containers being made
	down     int // workspaces whose old command was told to end, the new one not started
	mostMade int
	mostDown int
}

func (r *rollout) add(making, down int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.making, r.down = r.making+making, r.down+down
	r.mostMade, r.mostDown = max(r.mostMade, r.making), max(r.mostDown, r.down)
}

// follow counts in a runtime.
func (r *rollout) follow(f *runtimetest.Fake) {
	f.OnCall(func(_ context.Context, c runtimetest.Call) error {
		switch c.Method {
		case runtimetest.Prepare:
			r.add(1, 0)
		case runtimetest.Stop:
			r.add(0, 1)
		}
		return nil
	})
	f.AfterCall(func(_ context.Context, c runtimetest.Call) error {
		switch c.Method {
		case runtimetest.Prepare:
			r.add(-1, 0)
		case runtimetest.Start:
			r.add(0, -1)
		}
		return nil
	})
}

// TestOverload_GlobalSecret: a secret that hundreds of workspaces see is rolled out
// under the cycle limit, while nobody else waits for it.
func TestOverload_GlobalSecret(t *testing.T) {
	overload(t, func(t *testing.T, h *harness) {
		seeing, own := names("sees", 400), names("own", 30)
		h.createAll(seeing)
		h.createAll(append(slices.Clone(own), "single"), func(r *workspacev1.CreateWorkspaceRequest) {
			r.Secrets = []*workspacev1.SecretValue{{Key: "SHARED", Payload: &workspacev1.SecretValue_Text{Text: "mine"}}}
		})
		alone := h.setAndWait("single", "alone")
		ownBefore := make(map[string]*workspacev1.Workspace)
		for _, id := range own {
			ownBefore[id] = h.get("workspaces/" + id)
		}
		var r rollout
		r.follow(h.Runtime)
		done := h.watchDone(seeing)
		start := time.Now()
		resp := must2(h.Client.SetSecret(t.Context(), &workspacev1.SetSecretRequest{
			Name: "secrets/SHARED", Payload: &workspacev1.SetSecretRequest_Text{Text: "new"},
		}))(t)
		if got := resp.GetAffectedWorkspaces(); got != int32(len(seeing)) {
			t.Errorf("the change is said to affect %d workspaces", got)
		}

		// In the midst of it one workspace is changed, one is made.
		<-time.After(10 * prepareTime)
		if took := h.setAndWait("single", "now"); took > 3*alone {
			t.Errorf("a change of one workspace took %v during the rollout, %v without", took, alone)
		}
		created := time.Now()
		h.createAll([]string{"late"})
		if took := time.Since(created); took > 3*alone {
			t.Errorf("a new workspace took %v to start", took)
		}

		var at []time.Duration // when each was done, as the watch tells
		for range seeing {
			at = append(at, (<-done).Sub(start))
		}
		// The Fake's own time is all it took, and it was told of one by one.
		fair := time.Duration(len(seeing)/cycleLimit) * prepareTime
		if all := at[len(at)-1]; all < fair || all > fair*3/2 {
			t.Errorf("the rollout took %v, want about %v", all, fair)
		}
		for i := 1; i < len(at); i++ {
			if gap := at[i] - at[i-1]; gap > 5*prepareTime {
				t.Errorf("between %d and %d done nothing was to be seen for %v", i, i+1, gap)
			}
		}
		if r.mostMade > cycleLimit || r.mostMade < cycleLimit {
			t.Errorf("up to %d containers were made at once, the limit is %d", r.mostMade, cycleLimit)
		}
		if r.mostDown > cycleLimit {
			t.Errorf("up to %d workspaces were down at once, the limit is %d", r.mostDown, cycleLimit)
		}
		env := make(map[string][]string) // of what was started last
		for _, l := range h.Runtime.Launches("") {
			env[l.Instance.WorkspaceID] = l.Env
		}
		for _, id := range append(slices.Clone(seeing), "late") {
			if !slices.Contains(env[id], "SHARED=new") {
				t.Errorf("%s runs without the new value", id)
			}
		}
		for _, id := range own {
			w := h.get("workspaces/" + id)
			if w.GetContainerId() != ownBefore[id].GetContainerId() || w.GetGeneration() != ownBefore[id].GetGeneration() || !slices.Contains(env[id], "SHARED=mine") {
				t.Errorf("%s, which has a value of its own, was touched: %v", id, w)
			}
		}
	})
}

// watchDone watches until each of the ids was seen with a change pending and, a
// while later, with none, and sends the time of that.
func (h *harness) watchDone(ids []string) <-chan time.Time {
	h.t.Helper()
	stream := must2(h.Client.WatchWorkspaces(h.t.Context(), &workspacev1.WatchWorkspacesRequest{}))(h.t)
	recvUntil(h.t, stream, isSynced)
	done := make(chan time.Time, len(ids))
	go func() {
		waiting := make(map[string]bool) // true: seen with a change pending
		for _, id := range ids {
			waiting["workspaces/"+id] = false
		}
		for len(waiting) > 0 {
			resp, err := stream.Recv()
			if err != nil {
				h.t.Error(err)
				close(done)
				return
			}
			w := resp.GetWorkspace()
			pending, ok := waiting[w.GetName()]
			switch {
			case !ok:
			case w.GetReconciling():
				waiting[w.GetName()] = true
			case pending:
				delete(waiting, w.GetName())
				done <- time.Now()
			}
		}
	}()
	return done
}

// TestOverload_Waiters: a thousand that wait for one workspace, and one for each
// of a hundred, get their answers at once, and leave nothing behind.
func TestOverload_Waiters(t *testing.T) {
	overload(t, func(t *testing.T, h *harness) {
		ids := append(names("w", 100), "popular")
		h.createAll(ids)
		heap, goroutines := heapInUse(), goruntime.NumGoroutine()
		gate := h.Runtime.Hold(runtimetest.Prepare, "")
		defer gate.Release()
		var waiting, late atomic.Int64
		var released atomic.Pointer[time.Time]
		var wg sync.WaitGroup
		wait := func(id string, generation int64) {
			waiting.Add(1)
			wg.Go(func() {
				defer waiting.Add(-1)
				_, err := h.Client.WaitWorkspace(t.Context(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + id, Generation: generation})
				if at := released.Load(); err != nil || at == nil || time.Since(*at) > time.Duration(len(ids)/cycleLimit+1)*prepareTime {
					late.Add(1)
					t.Errorf("%s: %v", id, err)
				}
			})
		}
		for _, id := range ids {
			generation := h.set("workspaces/"+id+"/secrets/K", "new").GetGeneration()
			wait(id, generation)
			if id == "popular" {
				for range 999 {
					wait(id, generation)
				}
			}
		}
		perWaiter := (heapInUse() - heap) / waiting.Load()
		t.Logf("%d waiters: %d KB each, their clients included", waiting.Load(), perWaiter>>10)
		if n := waiting.Load(); n != 1100 {
			t.Errorf("%d wait, want 1100", n)
		}
		if perWaiter > 64<<10 {
			t.Errorf("a waiter takes %d KB", perWaiter>>10)
		}
		now := time.Now()
		released.Store(&now)
		gate.Release()
		wg.Wait()
		synctest.Wait()
		if got := goruntime.NumGoroutine(); got > goroutines+fewGoroutines {
			t.Errorf("%d goroutines are left, %d before", got, goroutines)
		}
	})
}
