package main

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/workspaced/workspaced/cmd/workspaced/internal/embedded"
	"github.com/workspaced/workspaced/server/loop"
	"github.com/workspaced/workspaced/server/workspace"
)

// background starts the loops that work for as long as the daemon does; they end
// with ctx. Their names are those in health and metrics.
func (d *running) background(ctx context.Context) {
	d.loops.Run(ctx, "hub", 3*workspace.HubBeat, d.hub.Run)
	d.loops.Every(ctx, "sweep", workspace.SweepInterval, time.Minute, d.supervisor.Sweep)
	d.loops.Every(ctx, "logs", 10*time.Second, time.Minute, d.driver.BoundLogs)
	d.door.background(ctx, d.loops)
	// Is the writer free?
	d.loops.Every(ctx, "store", 10*time.Second, 5*time.Second, d.store.Ping)
	// Does containerd answer, the private one or the one that was given?
	d.loops.Every(ctx, "containerd", 10*time.Second, 5*time.Second, func(ctx context.Context) error {
		return embedded.WaitReady(ctx, d.containerd)
	})
	d.loops.Run(ctx, "audit", 3*auditBeat, tendAudit(d.api))
	if d.cfg.AuditCopy != "" {
		copier := &auditCopier{store: d.store, sink: newAuditSink(d.cfg.AuditCopy), log: d.log}
		d.loops.Run(ctx, "audit-copy", 0, copier.run)
	}
	// No loop is stale before half a minute has passed, and each round wakes a
	// daemon that has nothing to do.
	d.loops.Every(ctx, "health", 5*time.Second, time.Second, func(context.Context) error {
		d.api.PublishLoops(d.status())
		return nil
	})
	switch interval, err := daemon.SdWatchdogEnabled(false); {
	case err != nil:
		d.log.Warn("the service manager's watchdog is not fed", "error", err)
	case interval > 0:
		d.loops.Every(ctx, "watchdog", interval/3, interval/3, d.feedWatchdog)
	}
}

// status tells how all loops do, those of the private containerd included.
func (d *running) status() []loop.Status {
	all := d.loops.Status()
	if d.private != nil {
		all = append(all, d.private.Loops()...)
	}
	return all
}

// feedWatchdog tells the service manager that the daemon lives, unless a loop
// hangs: then it has us ended and started anew. A loop that fails again and again
// is no reason for it: a restart gives a full disk no room, and does not heal
// containerd.
func (d *running) feedWatchdog(context.Context) error {
	for _, l := range d.status() {
		if l.Hangs {
			return fmt.Errorf("the loop %s hangs: the service manager's watchdog is not fed", l.Name)
		}
	}
	_, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog)
	return err
}
