package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
)

// watchPlan is how somebody watches.
type watchPlan struct {
	filter string
	pause  time.Duration // between two responses, at most: a slow reader
	events int           // after so many it goes away, and comes back with its token; 0: it stays
	forget int           // one of so many times it comes back without; 0: never
}

func drawWatcher(p *plan, i int) watchPlan {
	d := roll(p.seed, i, "watcher")
	return watchPlan{
		filter: pick(d, "", "", "", "parked = true", "state = RUNNING", `labels:team`, `name = "workspaces/s*"`),
		pause:  pick(d, 0, 0, p.length/100, p.length/10),
		events: pick(d, 0, 1, 3, 10),
		forget: pick(d, 0, 0, 3),
	}
}

// watcher keeps a picture of all workspaces, by what it is told.
type watcher struct {
	*scene
	watchPlan
	n      int
	api    workspacev1.WorkspaceControlClient
	cancel context.CancelFunc
	done   chan struct{}
	calm   chan struct{} // closed when it is to be slow no more

	mu      sync.Mutex
	picture map[string]*workspacev1.Workspace // by uid
	synced  bool
}

func (s *scene) startWatcher(i int) {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{
		scene: s, watchPlan: s.plan.watchers[i], n: i, api: s.api(i), cancel: cancel, done: make(chan struct{}),
		calm: s.faults.healed, picture: make(map[string]*workspacev1.Workspace),
	}
	s.watchers = append(s.watchers, w)
	go func() {
		defer close(w.done)
		w.run(ctx)
	}()
}

func (s *scene) stopWatchers() {
	for _, w := range s.watchers {
		w.cancel()
		<-w.done
	}
}

// run watches, with its token over all streams.
func (w *watcher) run(ctx context.Context) {
	token := ""
	for streams := 0; ctx.Err() == nil; streams++ {
		d := roll(w.plan.seed, w.n<<16|streams, "stream")
		if w.forget > 0 && d.chance(w.forget) {
			token = ""
		}
		var err error
		token, err = w.stream(ctx, token, d)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if status.Code(err) != codes.Unavailable || !slices.Contains([]string{"", server.ReasonDraining}, reasonOf(err)) {
				w.problem("watcher %d: %s", w.n, describeError(err))
			}
		}
		// It comes back, but never at the same moment: that would be for ever.
		w.sleep(ctx, d.between(time.Millisecond, w.plan.length))
	}
}

func (w *watcher) sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// stream reads one stream, and returns where to go on.
func (w *watcher) stream(ctx context.Context, token string, d dice) (string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.noteStream(token)
	stream, err := w.api.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{Filter: w.filter, ResumeToken: token})
	if err != nil {
		w.count(opWatch, err)
		return token, err
	}
	w.mu.Lock()
	w.synced = false
	if token == "" {
		clear(w.picture)
	}
	w.mu.Unlock()
	for n := 1; ; n++ {
		resp, err := stream.Recv()
		if err != nil {
			w.count(opWatch, err)
			if errors.Is(err, io.EOF) {
				err = status.Error(codes.Unavailable, "the stream has ended")
			}
			return token, err
		}
		w.take(resp)
		token = resp.GetResumeToken()
		select {
		case <-w.calm:
			continue
		default:
		}
		if w.events > 0 && n >= w.events {
			w.count(opWatch, nil)
			return token, nil
		}
		if w.pause > 0 {
			select {
			case <-time.After(d.between(0, w.pause)):
			case <-w.calm:
			case <-ctx.Done():
			}
		}
	}
}

func (w *watcher) noteStream(token string) {
	w.world.mu.Lock()
	defer w.world.mu.Unlock()
	w.report.Watches++
	if token != "" {
		w.report.Resumed++
	}
}

// take draws a response into the picture.
func (w *watcher) take(resp *workspacev1.WatchWorkspacesResponse) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case resp.GetWorkspace() != nil:
		ws := resp.GetWorkspace()
		old := w.picture[ws.GetUid()]
		if old.GetGeneration() > ws.GetGeneration() {
			w.problem("watcher %d: %s went back from generation %d to %d", w.n, ws.GetName(), old.GetGeneration(), ws.GetGeneration())
		}
		if ws.GetObservedGeneration() > ws.GetGeneration() {
			w.problem("watcher %d: %s has observed generation %d of %d", w.n, ws.GetName(), ws.GetObservedGeneration(), ws.GetGeneration())
		}
		w.picture[ws.GetUid()] = ws
	case resp.GetRemoved() != nil:
		delete(w.picture, resp.GetRemoved().GetUid())
	case resp.GetResync() != nil:
		clear(w.picture)
		w.synced = false
	case resp.GetSynced() != nil:
		w.synced = true
	}
}

// check compares the picture with what a list says.
func (w *watcher) check() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := listWorkspaces(ctx, w.api, w.filter, 100)
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.synced {
		return fmt.Errorf("watcher %d (%q) was never told that it has everything", w.n, w.filter)
	}
	rest := maps.Clone(w.picture)
	for _, ws := range list {
		ws.LastHeartbeatTime = nil // which is no change
		if !proto.Equal(rest[ws.GetUid()], ws) {
			return fmt.Errorf("watcher %d (%q) was told %v of what is %v", w.n, w.filter, rest[ws.GetUid()], ws)
		}
		delete(rest, ws.GetUid())
	}
	for _, ws := range rest {
		return fmt.Errorf("watcher %d (%q) was never told that %s (%s) is gone", w.n, w.filter, ws.GetName(), strings.ToLower(ws.GetState().String()))
	}
	return nil
}
