package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// The workspaces of the tests of adoption, each in another state when the
// machinery below it goes away.
const (
	calm    = "calm"    // runs, and has nothing to do
	changed = "changed" // a secret was set a moment ago
	pulling = "pulling" // its next image is being fetched
	broken  = "broken"  // its next image does not exist: an older generation runs
	parked  = "parked"  // was stopped, and changed since
	parking = "parking" // is being stopped
	doomed  = "doomed"  // is being deleted
)

// outage is what goes away.
type outage struct {
	name string
	// own: containerd is not the daemon's child.
	own bool
	// down makes it go away, and during is done then. up brings it back.
	down, during, up func(*fleet) error
	// daemonLives: the daemon does not notice, or goes on.
	daemonLives bool
	// reboot: no container survives.
	reboot bool
	// onEach: on every version of containerd, and not only in the long run.
	onEach bool
}

func daemonStop(s *fleet) error { return s.Daemon.Stop() }
func daemonKill(s *fleet) error { return s.Daemon.Kill() }
func daemonUp(s *fleet) error   { return s.Daemon.Start(s.ctx) }
func ctrdKill(s *fleet) error   { return s.Daemon.KillContainerd(s.ctx) }
func ctrdStop(s *fleet) error   { return s.Daemon.Own.Stop() }
func ctrdUp(s *fleet) error     { return s.Daemon.Own.Start(s.ctx) }
func power(s *fleet) error      { return s.Reboot(s.ctx, s.prefix) }
func bothKill(s *fleet) error   { return errors.Join(daemonKill(s), ctrdKill(s)) }
func nothing(*fleet) error      { return nil }

// changeAgain sets a secret while containerd is away: durable, and told so.
func changeAgain(s *fleet) error {
	s.setSecret(changed, "B", "while containerd is away")
	return nil
}

var outages = []outage{
	{name: "daemon restarted", own: true, down: daemonStop, up: daemonUp},
	{name: "daemon killed", own: true, down: daemonKill, up: daemonUp},
	{name: "containerd restarted", own: true, down: ctrdStop, during: changeAgain, up: ctrdUp, daemonLives: true},
	{name: "containerd killed", own: true, down: ctrdKill, during: changeAgain, up: ctrdUp, daemonLives: true},
	{name: "both killed", own: true, down: bothKill, up: daemonUp, onEach: true},
	{name: "host rebooted", own: true, down: power, up: daemonUp, reboot: true},
	{name: "daemon restarted, private containerd", down: daemonStop, up: daemonUp},
	{name: "daemon killed, private containerd", down: daemonKill, up: daemonUp},
	{name: "private containerd killed", down: ctrdKill, during: changeAgain, up: nothing, daemonLives: true},
	{name: "both killed, private containerd", down: bothKill, up: daemonUp},
	{name: "host rebooted, private containerd", down: power, up: daemonUp, reboot: true, onEach: true},
}

// Issue item 5: whatever goes away below the workspaces and comes back, what
// should run runs, at its generation and with its secrets, and what did not have
// to be restarted was not; what was stopped stays stopped; what was asked for just
// before is done; who waits or watches is answered.
func TestContract08_Adoption(t *testing.T) {
	for _, newer := range []bool{false, true} {
		for _, own := range []bool{true, false} {
			t.Run(fmt.Sprintf("containerd 2.3 %v, own %v", newer, own), func(t *testing.T) {
				opts := lab.Options{OwnContainerd: own}
				if newer {
					opts.Path = newerContainerd(t)
				}
				s := newAdoption(t, opts)
				for _, o := range outages {
					if o.own != own || (newer && !o.onEach && soakTime() == 0) {
						continue
					}
					// Each finds what the one before has left.
					if !t.Run(o.name, func(t *testing.T) { s.on(t); s.survive(o) }) {
						return // what follows would fail for the same reason
					}
				}
			})
		}
	}
}

func newAdoption(t *testing.T, opts lab.Options) *fleet {
	t.Helper()
	opts.Args = []string{"--drain-timeout=1s"} // there is always a pull that does not end
	s := newFleet(t, 6*time.Minute, opts)
	for _, name := range []string{calm, changed, pulling, broken, parked, parking, doomed} {
		s.add(name, map[string]string{"A": "1"})
	}
	s.verify()
	s.change(broken, &workspacev1.WorkspaceSpec{Image: s.Registry.Host + "/nowhere:1"}, "spec.image")
	s.asked[broken].degraded = true
	s.park(parked)
	s.verify()
	return s
}

// survive makes the workspaces busy, lets an outage happen, and checks that
// everything is as it should be after it.
func (s *fleet) survive(o outage) {
	t := s.t
	if a := s.asked[doomed]; !a.exists {
		s.add(doomed, map[string]string{"A": "1"})
	}
	if s.asked[parking].parked {
		s.unpark(parking)
	}
	s.verify()
	_, _, token := s.watch("")
	ref, hold, err := s.PushSlow(s.ctx, "next-"+s.next())
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Release()
	s.change(pulling, &workspacev1.WorkspaceSpec{Image: ref}, "spec.image")
	s.waitFor("the pull", hold.Reached)
	s.setSecret(pulling, "A", s.next())
	s.setSecret(parked, "A", s.next())
	identities := map[string]identity{}
	for _, name := range []string{calm, broken} {
		identities[name] = s.identity(s.id(name))
	}
	waited := make(chan error, 1)
	go func(client workspacev1.WorkspaceControlClient) {
		_, err := client.WaitWorkspace(s.ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/" + s.id(pulling)})
		waited <- err
	}(s.client())
	s.setSecret(changed, "A", s.next())
	s.park(parking)
	s.remove(doomed)

	if err := o.down(s); err != nil {
		t.Fatal(err)
	}
	if o.during != nil {
		if err := o.during(s); err != nil {
			t.Fatal(err)
		}
	}
	if o.reboot {
		for _, a := range s.asked {
			a.again = true // the same generation, in a new container
		}
	}
	began := time.Now()
	if err := o.up(s); err != nil {
		t.Fatal(err)
	}
	ready := time.Since(began)
	s.await(calm)
	adopted := time.Since(began)
	hold.Release()
	after := s.verify()
	all := time.Since(began)

	for name, was := range identities {
		switch now := s.identity(s.id(name)); {
		case o.reboot && now.Inside != was.Inside:
			t.Errorf("%s runs generation %s, ran %s", name, now.Inside, was.Inside)
		case !o.reboot && now != was:
			t.Errorf("%s was restarted: %+v, was %+v", name, now, was)
		}
	}
	switch err := <-waited; {
	case o.daemonLives && err != nil:
		t.Errorf("who waited was told %v", err)
	case !o.daemonLives && status.Code(err) != codes.Unavailable:
		t.Errorf("who waited was told %v, want UNAVAILABLE", err)
	}
	s.wait(s.id(pulling), after[pulling].Generation)
	s.checkWatch(token, after)
	// What was changed while it was parked is there when it starts.
	s.unpark(parked)
	s.verify()
	s.park(parked)
	s.verify()
	t.Logf("%s: ready after %v, the calm one answers and is on record after %v, everything as asked for after %v", o.name, round(ready), round(adopted), round(all))
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// watch reads a watch up to its sync marker: what there is by name, and what is
// gone.
func (s *fleet) watch(token string) (there map[string]*workspacev1.Workspace, gone []string, next string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	stream, err := s.client().WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{ResumeToken: token})
	if err != nil {
		s.t.Fatal(err)
	}
	there = map[string]*workspacev1.Workspace{}
	for {
		resp, err := stream.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		switch e := resp.Event.(type) {
		case *workspacev1.WatchWorkspacesResponse_Workspace:
			there[e.Workspace.Name] = e.Workspace
		case *workspacev1.WatchWorkspacesResponse_Removed:
			gone = append(gone, e.Removed.Name)
		case *workspacev1.WatchWorkspacesResponse_Resync:
			s.t.Error("the watch begins anew, although the database is the same")
		case *workspacev1.WatchWorkspacesResponse_Synced:
			return there, gone, resp.ResumeToken
		}
	}
}

// checkWatch resumes a watch, which has to tell of everything since.
func (s *fleet) checkWatch(token string, after map[string]*workspacev1.Workspace) {
	s.t.Helper()
	there, gone, _ := s.watch(token)
	for _, name := range []string{changed, pulling, parked, parking} {
		if w := there["workspaces/"+s.id(name)]; !proto.Equal(w, after[name]) {
			s.t.Errorf("the watch says of %s: %v, it is %v", name, w, after[name])
		}
	}
	if want := []string{"workspaces/" + s.id(doomed)}; !slices.Equal(gone, want) {
		s.t.Errorf("the watch says that %v are gone, want %v", gone, want)
	}
}
