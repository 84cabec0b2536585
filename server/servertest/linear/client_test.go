package linear_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/servertest"
	"github.com/workspaced/workspaced/server/servertest/linear"
)

type kv = map[string]string

type versions = map[string]int64

// Each kind of operation, with each outcome, is what the model says the server
// does.
func TestClient(t *testing.T) {
	h := linear.NewHistory()
	synctest.Test(t, func(t *testing.T) {
		s := servertest.New(t)
		c := &linear.Client{API: s.Client, History: h}
		steps := []struct {
			op   linear.Op
			want linear.Result
		}{
			{linear.Op{Kind: linear.Create, Workspace: "w", Image: "any", Set: kv{"A": "1"}}, linear.Result{Generation: 1, Changed: true}},
			{linear.Op{Kind: linear.Create, Workspace: "w", Image: "any"}, linear.Result{Outcome: linear.Exists}},
			{linear.Op{Kind: linear.Wait, Workspace: "w"}, linear.Result{Generation: 1, Observed: 1}},
			{linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"A": "2"}},
				linear.Result{Generation: 2, Changed: true, Affected: 1, Versions: versions{"A": 2}}},
			{linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"A": "2"}}, linear.Result{Generation: 2, Versions: versions{"A": 2}}},
			{linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"A": "3"}, IfVersion: 2},
				linear.Result{Generation: 3, Changed: true, Affected: 1, Versions: versions{"A": 3}}},
			{linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"A": "4"}, IfVersion: 2}, linear.Result{Outcome: linear.Mismatch}},
			{linear.Op{Kind: linear.Batch, Workspace: "w", Set: kv{"A": "5", "B": "1"}, Delete: []string{"C"}, NextStart: true},
				linear.Result{Generation: 3, Changed: true, Versions: versions{"A": 4, "B": 1}}},
			{linear.Op{Kind: linear.List, Workspace: "w"}, linear.Result{Versions: versions{"A": 4, "B": 1}}},
			{linear.Op{Kind: linear.Delete, Workspace: "w", Delete: []string{"A"}}, linear.Result{Generation: 4, Changed: true, Affected: 1}},
			{linear.Op{Kind: linear.Delete, Workspace: "w", Delete: []string{"A"}}, linear.Result{Outcome: linear.NotFound}},
			{linear.Op{Kind: linear.Delete, Workspace: "w", Delete: []string{"A"}, AllowMissing: true}, linear.Result{Generation: 4}},
			{linear.Op{Kind: linear.Secret, Workspace: "w", Key: "A"}, linear.Result{Outcome: linear.NotFound}},
			{linear.Op{Kind: linear.Secret, Workspace: "w", Key: "B"}, linear.Result{Versions: versions{"B": 1}}},
			{linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"A": "6"}},
				linear.Result{Generation: 5, Changed: true, Affected: 1, Versions: versions{"A": 5}}},
			{linear.Op{Kind: linear.Batch, Set: kv{"B": "hidden", "G": "1"}, Delete: []string{"none"}},
				linear.Result{Changed: true, Affected: 1, Versions: versions{"B": 1, "G": 1}}},
			{linear.Op{Kind: linear.Set, Set: kv{"B": "hidden still"}}, linear.Result{Changed: true, Versions: versions{"B": 2}}},
			{linear.Op{Kind: linear.Delete, Delete: []string{"G"}, NextStart: true}, linear.Result{Changed: true}},
			{linear.Op{Kind: linear.List}, linear.Result{Versions: versions{"B": 2}}},
			{linear.Op{Kind: linear.Get, Workspace: "w"}, linear.Result{Generation: 6, Observed: 6}},
			{linear.Op{Kind: linear.Stop, Workspace: "w"}, linear.Result{Generation: 6, Changed: true}},
			{linear.Op{Kind: linear.Stop, Workspace: "w"}, linear.Result{Generation: 6}},
			{linear.Op{Kind: linear.Restart, Workspace: "w"}, linear.Result{Outcome: linear.Parked}},
			{linear.Op{Kind: linear.Start, Workspace: "w"}, linear.Result{Generation: 7, Changed: true}},
			{linear.Op{Kind: linear.Restart, Workspace: "w"}, linear.Result{Generation: 8, Changed: true}},
			{linear.Op{Kind: linear.Wait, Workspace: "w", Generation: 8}, linear.Result{Generation: 8, Observed: 8}},
			{linear.Op{Kind: linear.Wait, Workspace: "w", Generation: 9}, linear.Result{Outcome: linear.Ahead}},
			{linear.Op{Kind: linear.Get, Workspace: "none"}, linear.Result{Outcome: linear.NotFound}},
		}
		for _, step := range steps {
			if step.op.Kind == linear.Get {
				synctest.Wait() // the cycle is over
			}
			got, err := c.Do(t.Context(), step.op)
			if (err == nil) != (step.want.Outcome == linear.Done) {
				t.Errorf("%s: %v", step.op, err)
			}
			if len(got.Versions) == 0 {
				got.Versions = nil
			}
			if diff := cmp.Diff(step.want, got); diff != "" {
				t.Errorf("%s: %s", step.op, diff)
			}
		}
	})
	if err := h.Check(linear.Options{Timeout: time.Minute}); err != nil {
		t.Error(err)
	}
}

// What is refused changed nothing, and needs no place in the order.
func TestClientDropsWhatWasRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := servertest.New(t)
		h := linear.NewHistory()
		c := &linear.Client{API: s.Client, History: h}
		if _, err := c.Do(t.Context(), linear.Op{Kind: linear.Create, Workspace: "No Name", Image: "any"}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
		s.Drain()
		if _, err := c.Do(t.Context(), linear.Op{Kind: linear.Create, Workspace: "w", Image: "any"}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		if _, err := c.Do(t.Context(), linear.Op{Kind: linear.Launch, Workspace: "w"}); err == nil {
			t.Error("no client launches")
		}
		if len(h.Entries()) > 0 {
			t.Errorf("recorded:\n%s", h)
		}
	})
}

// lossy loses the answers to changes, until its caller has asked often enough.
type lossy struct {
	grpc.ClientConnInterface
	mu   sync.Mutex
	lose int
}

func (l *lossy) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	err := l.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lose > 0 {
		l.lose--
		return status.Error(codes.Unavailable, "lost")
	}
	return err
}

func TestClientRetries(t *testing.T) {
	tests := []struct {
		name  string
		retry time.Duration
		lose  int
		op    linear.Op
		want  linear.Outcome
		sets  int64 // the version afterwards
	}{
		{"a lost answer is asked for again, and nothing is done twice", time.Second, 3,
			linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"K": "v"}}, linear.Done, 1},
		{"no longer than the context lives", time.Second, 1000,
			linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"K": "v"}}, linear.Unknown, 1},
		{"not unless it is asked to", 0, 1,
			linear.Op{Kind: linear.Set, Workspace: "w", Set: kv{"K": "v"}}, linear.Unknown, 1},
		{"a refusal after a lost answer tells nothing of the first attempt", time.Second, 1,
			linear.Op{Kind: linear.Delete, Workspace: "w", Delete: []string{"none"}}, linear.Unknown, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := servertest.New(t)
				h := linear.NewHistory()
				conn := &lossy{ClientConnInterface: s.Conn}
				good := &linear.Client{API: s.Client, History: h}
				c := &linear.Client{API: workspacev1.NewWorkspaceControlClient(conn), History: h, ID: 1, Retry: tt.retry}
				if _, err := good.Do(t.Context(), linear.Op{Kind: linear.Create, Workspace: "w", Image: "any"}); err != nil {
					t.Fatal(err)
				}
				conn.lose = tt.lose
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				got, err := c.Do(ctx, tt.op)
				if got.Outcome != tt.want || (err == nil) != (tt.want == linear.Done) {
					t.Errorf("got %+v, %v", got, err)
				}
				entries := h.Entries()
				if last := entries[len(entries)-1]; last.Result.Outcome != tt.want {
					t.Errorf("recorded: %v", last)
				}
				list, err := good.Do(t.Context(), linear.Op{Kind: linear.List, Workspace: "w"})
				if err != nil || list.Versions["K"] != tt.sets {
					t.Errorf("afterwards: %+v, %v", list, err)
				}
			})
		})
	}
}
