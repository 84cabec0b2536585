package e2e

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// act makes the daemon pass steps.
type act struct {
	// before is done while nothing fails yet, during while it does.
	before, during func(*faulty)
	// after is done once the daemon runs again, and has to leave nothing that
	// fails; then everything is looked at.
	after func(*faulty)
	// restore is done at the end.
	restore func(*faulty)
}

// actSecret changes a secret: all the steps of a usual cycle.
var actSecret = act{during: func(s *faulty) {
	s.setSecret(subject, "A", s.next())
	s.setSecret(other, "A", s.next())
}}

// actFile changes a file, by a restart.
var actFile = act{during: func(s *faulty) {
	s.setFile(subject, "FILE", s.next(), workspacev1.Apply_APPLY_NOW)
}}

// actLive changes files as the container runs, which then hears of it.
var actLive = act{
	before: func(s *faulty) {
		s.change(subject, &workspacev1.WorkspaceSpec{LiveSignal: "SIGHUP"}, "spec.live_signal")
	},
	during:  func(s *faulty) { s.setFile(subject, "FILE", s.next(), workspacev1.Apply_APPLY_LIVE) },
	restore: func(s *faulty) { s.setSecret(subject, "A", s.next()) },
}

// actPull changes the image to one that has to be fetched.
var actPull = act{during: func(s *faulty) {
	s.change(subject, &workspacev1.WorkspaceSpec{Image: s.push()}, "spec.image")
	s.setSecret(other, "A", s.next())
}}

// actCreate creates a workspace with a volume.
var actCreate = act{
	before: func(s *faulty) {
		if a := s.asked[extra]; a != nil && a.exists {
			s.remove(extra)
			s.verify()
		}
	},
	during: func(s *faulty) { s.addExtra() },
}

// actDelete deletes one.
var actDelete = act{
	before: func(s *faulty) {
		if a := s.asked[extra]; a == nil || !a.exists {
			s.addExtra()
			s.verify()
		}
	},
	during: func(s *faulty) { s.remove(extra) },
}

func (s *faulty) addExtra() {
	s.add(extra, map[string]string{"A": s.next()}, &workspacev1.Volume{
		MountPath: "/data", Source: &workspacev1.Volume_VolumeName{VolumeName: "data"},
	})
}

// actPark stops a workspace.
var actPark = act{
	during:  func(s *faulty) { s.park(subject) },
	restore: func(s *faulty) { s.unpark(subject) },
}

// actParkBusy stops a workspace whose image is being fetched.
var actParkBusy = act{
	before: func(s *faulty) {
		ref, hold, err := s.PushSlow(s.ctx, "slow-"+s.next())
		if err != nil {
			s.t.Fatal(err)
		}
		s.change(subject, &workspacev1.WorkspaceSpec{Image: ref}, "spec.image")
		s.waitFor("the pull", hold.Reached)
		s.t.Cleanup(hold.Release)
		s.release = hold.Release
	},
	during: func(s *faulty) { s.park(subject) },
	restore: func(s *faulty) {
		s.release()
		s.unpark(subject)
	},
}

// actDie ends a container's process.
var actDie = act{during: func(s *faulty) {
	s.asked[subject].again = true
	s.kill(s.get(s.id(subject)), unix.SIGKILL)
}}

// actFail changes the image to one that there is not.
var actFail = act{
	during: func(s *faulty) {
		s.change(subject, &workspacev1.WorkspaceSpec{Image: s.Registry.Host + "/nowhere:1"}, "spec.image")
	},
	after: func(s *faulty) {
		s.change(subject, &workspacev1.WorkspaceSpec{Image: lab.DemoImage}, "spec.image")
	},
}

// actExecFails changes the command to one that can't be executed.
var actExecFails = act{
	before: func(s *faulty) {
		s.change(subject, &workspacev1.WorkspaceSpec{Image: s.push()}, "spec.image")
		s.verify()
	},
	during: func(s *faulty) {
		s.asked[subject].again = true // the last good one
		s.change(subject, &workspacev1.WorkspaceSpec{Command: []string{"/broken"}}, "spec.command")
	},
	after: func(s *faulty) {
		s.change(subject, &workspacev1.WorkspaceSpec{}, "spec.command")
	},
}

// actBoot starts the daemon.
var actBoot = act{
	before: func(s *faulty) {
		if err := s.Daemon.Stop(); err != nil {
			s.t.Fatal(err)
		}
	},
	during: func(s *faulty) {
		if err := s.Daemon.Launch(s.ctx); err != nil {
			s.t.Fatal(err)
		}
	},
}

// actForget replaces a container whose record the driver has lost.
var actForget = act{
	before: func(s *faulty) {
		id := s.get(s.id(subject)).ContainerId
		if err := s.Daemon.Stop(); err != nil {
			s.t.Fatal(err)
		}
		record, err := s.Daemon.InstanceFile(id, "record.json")
		if err == nil {
			err = os.Remove(record)
		}
		if err != nil {
			s.t.Fatal(err)
		}
		s.start()
		if now := s.verify()[subject].ContainerId; now != id {
			s.t.Errorf("restarted for want of a record that nothing depends on: %s, was %s", now, id)
		}
	},
	during: actSecret.during,
}

// actKnown is actSecret for images that the daemon has seen before.
var actKnown = act{
	before: func(s *faulty) {
		actSecret.during(s)
		s.verify()
	},
	during: actSecret.during,
}

// acts by step. Those that are not here are passed by a change of a secret.
var acts = map[string]act{
	"lease.create": actPull, "lease.delete": actPull, "user.find": actPull, "snapshot.stat": actKnown,
	"image.resolve": actPull, "image.fetch": actPull, "image.unpack": actPull, "image.import": actBoot,
	"files.write": actFile, "files.switch": actFile, "files.link": actLive,
	"secrets.live": actLive, "live.signal": actLive, "record.rotate": actLive, "status.rotated": actLive,
	"volumes.make": actCreate, "volumes.own": actCreate,
	"status.stopped": actPark, "status.settled": actParkBusy,
	"exit.wait": actDie, "exit.status": actDie, "record.exit": actDie, "status.exit": actDie,
	"status.failure": actFail, "record.undo": actExecFails,
	"container.list": actForget, "container.get": actForget, "task.get": actForget, "task.kill": actForget, "shim.end": actForget, "bundle.remove": actForget,
	"log.remove": actDelete, "volumes.remove": actDelete, "parent.remove": actDelete, "status.deleted": actDelete,
}
