package server_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/servertest"
)

type watchStream struct {
	workspacev1.WorkspaceControl_WatchWorkspacesClient
	t      *testing.T
	cancel context.CancelFunc
	token  string // of the last response
}

func (h *harness) watch(filter, token string) *watchStream {
	h.t.Helper()
	// What never comes is an error after days of the bubble's clock.
	ctx, cancel := context.WithTimeout(h.ctx(), 72*time.Hour)
	h.t.Cleanup(cancel)
	stream := must2(h.Client.WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{Filter: filter, ResumeToken: token}))(h.t)
	return &watchStream{stream, h.t, cancel, token}
}

// until reads up to an event that looks like this, see show.
func (s *watchStream) until(last string) []string {
	s.t.Helper()
	all := recvUntil(s.t, s, func(r *workspacev1.WatchWorkspacesResponse) bool {
		s.token = r.GetResumeToken()
		return show([]*workspacev1.WatchWorkspacesResponse{r})[0] == last
	})
	return show(all)
}

// want checks that these and no other events come, in any order before the
// last.
func (s *watchStream) want(events ...string) {
	s.t.Helper()
	got := s.until(events[len(events)-1])
	slices.Sort(got[:len(got)-1])
	slices.Sort(events[:len(events)-1])
	if diff := cmp.Diff(events, slices.Compact(got)); diff != "" {
		s.t.Errorf("events: %s", diff)
	}
}

func (h *harness) label(id, value string) {
	h.t.Helper()
	must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: "workspaces/" + id, Labels: map[string]string{"team": value}}}))(h.t)
	synctest.Wait()
}

func (h *harness) delete(id string) {
	h.t.Helper()
	must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/" + id}))(h.t)
	synctest.Wait()
}

// TestContract15_Watch: what is there, a sync marker, every change, what is gone.
func TestContract15_Watch(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		empty := h.watch("", "")
		empty.want("synced")
		h.create("gone")
		h.delete("gone")
		h.create("a")
		h.create("b")

		s := h.watch("", "")
		s.want("+a", "+b", "synced") // and not what was gone before
		h.label("a", "x")
		r := must2(s.Recv())(t)
		if r.GetWorkspace().GetLabels()["team"] != "x" || r.GetWorkspace().GetName() != "workspaces/a" {
			t.Errorf("got %v", r)
		}
		h.set("workspaces/b/secrets/A", "1")
		for { // the states of its restart
			w := must2(s.Recv())(t).GetWorkspace()
			if w.GetName() != "workspaces/b" || w.GetGeneration() != 2 {
				t.Fatalf("got %v", w)
			}
			if !w.GetReconciling() {
				break
			}
		}
		uid := h.get("workspaces/a").GetUid()
		h.delete("a")
		for {
			r := must2(s.Recv())(t)
			if r.GetRemoved() != nil {
				if r.GetRemoved().GetName() != "workspaces/a" || r.GetRemoved().GetUid() != uid {
					t.Errorf("got %v", r)
				}
				break
			}
		}
		h.create("c")
		s.until("+c")
	})
}

// TestContract15_WatchResumes: only what changed since comes, also after a
// restart of the daemon.
func TestContract15_WatchResumes(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{"a", "b", "c", "d"} {
			h.create(id)
		}
		s := h.watch("", "")
		s.want("+a", "+b", "+c", "+d", "synced")
		s.cancel()
		h.label("b", "x")
		h.delete("c")
		for range 2 {
			resumed := h.watch("", s.token)
			resumed.want("+b", "-c", "synced")
			resumed.cancel()
			if err := h.Restart(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		// A token of the middle of the initial state is as good.
		part := h.watch("", "")
		first := must2(part.Recv())(t)
		part.cancel()
		h.delete("d")
		rest := h.watch("", first.GetResumeToken())
		got := append(show([]*workspacev1.WatchWorkspacesResponse{first}), rest.until("synced")...)
		slices.Sort(got)
		if diff := cmp.Diff([]string{"+a", "+b", "-d", "synced"}, slices.Compact(got)); diff != "" && !cmp.Equal([]string{"+a", "+b", "+d", "-d", "synced"}, slices.Compact(got)) {
			t.Error(diff)
		}
		// So is one of a stream that had nothing to tell any more.
		h.watch("", rest.token).want("synced")
	})
}

// TestContract15_WatchResyncs: a token that is too old, or of another database,
// gives everything anew.
func TestContract15_WatchResyncs(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a")
		h.create("b")
		s := h.watch("", "")
		s.until("synced")
		s.cancel()
		h.delete("a")
		advance(25 * time.Hour) // tombstones are kept for a day
		h.create("c")
		h.delete("c")

		old := h.watch("", s.token)
		old.want("resync")
		restart := old.token
		old.want("+b", "synced")
		h.label("b", "x")
		old.until("+b")
		h.watch("", restart).want("+b", "synced") // the marker was received, what follows was not

		other := &harness{Server: servertest.New(t), t: t}
		other.create("z")
		for i := range 10 { // its feed is longer than the token's place
			other.label("z", fmt.Sprint(i))
		}
		foreign := other.watch("", s.token)
		foreign.want("resync")
		foreign.want("+z", "synced")
	})
}

// TestContract15_WatchThatKeepsUpIsNotResynced, however long it lives and
// whatever the feed forgets.
func TestContract15_WatchThatKeepsUpIsNotResynced(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("stays")
		s := h.watch("", "")
		s.want("+stays", "synced")
		for i := range 2 {
			id := fmt.Sprintf("w%d", i)
			h.create(id)
			h.delete(id)
			s.want("+"+id, "-"+id)
			advance(25 * time.Hour)
		}
		s.cancel()
		h.watch("", s.token).want("synced")
	})
}

// TestContract15_WatchFilters: what ceases to match is removed once.
func TestContract15_WatchFilters(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{"a", "b", "c"} {
			h.create(id)
			h.label(id, "x")
		}
		h.create("other")
		s := h.watch(`labels.team = "x"`, "")
		s.want("+a", "+b", "+c", "synced")

		h.label("a", "y")
		s.want("-a")
		h.label("a", "z") // still none of ours
		h.label("other", "y")
		h.label("b", "x") // nothing changed
		h.label("other", "x")
		s.want("+other")
		h.delete("a") // was removed before
		h.delete("other")
		s.want("+other", "-other") // DELETING, then gone
		h.create("a2")
		h.label("a2", "x")
		s.want("+a2")
		s.cancel()

		// The server does not know what this client has: it is told about each
		// change of what does not match, once.
		h.label("b", "y")
		h.label("c", "w")
		resumed := h.watch(`labels.team = "x"`, s.token)
		resumed.want("-b", "-c", "synced")
		h.label("b", "z")
		h.label("b", "x")
		resumed.want("+b")
		h.delete("c")
		h.delete("b")
		resumed.want("+b", "-b")
	})
}

// TestContract15_SlowWatcherBlocksNobody: not the changes, not the actors, not
// another watcher, and in the end it has seen the newest state of all.
func TestContract15_SlowWatcherBlocksNobody(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		big := map[string]string{}
		for i := range 2 {
			big[fmt.Sprintf("V%d", i)] = strings.Repeat("x", 30000)
		}
		slow := h.watch("", "") // reads nothing
		quick := h.watch("", "")
		quick.until("synced")
		const workspaces, rounds = 4, 5
		for i := range workspaces {
			h.create(fmt.Sprintf("w%d", i), func(r *createReq) { r.Workspace.Spec.Env = big })
		}
		for round := range rounds {
			for i := range workspaces {
				resp := must2(h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: fmt.Sprintf("workspaces/w%d", i), Model: fmt.Sprint(round)}))(t)
				h.WaitGeneration(fmt.Sprintf("w%d", i), resp.GetGeneration())
			}
		}
		read := func(s *watchStream) (events int) {
			newest := make(map[string]string)
			for len(newest) < workspaces || slices.ContainsFunc(slices.Collect(maps.Values(newest)), func(m string) bool { return m != fmt.Sprint(rounds-1) }) {
				w := must2(s.Recv())(t).GetWorkspace()
				if w != nil {
					newest[w.GetName()] = w.GetModel()
				}
				events++
			}
			return events
		}
		read(quick)
		if n := read(slow); n > workspaces*rounds {
			t.Errorf("the slow one got %d events: somebody kept them", n)
		}
	})
}

func TestWatchEndsWhenTheServerDrains(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		s := h.watch("", "")
		s.until("synced")
		h.Drain()
		_, err := s.Recv()
		wantCode(t, err, codes.Unavailable, "DRAINING")
		if d := detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration(); d <= 0 {
			t.Errorf("retry after %v", d)
		}
		_, err = h.watch("", s.token).Recv()
		wantCode(t, err, codes.Unavailable, "DRAINING")
	})
}
