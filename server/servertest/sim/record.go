package sim

import (
	"fmt"
	"strings"

	"github.com/workspaced/workspaced/server/servertest/internal/daemon"
	"github.com/workspaced/workspaced/store"
)

// recordFields reads the fields of a record, as fieldsOf those of an answer.
func recordFields(w *store.Workspace) map[string]string {
	grace := "0s"
	if w.Spec.StopGrace != nil {
		grace = w.Spec.StopGrace.String()
	}
	return map[string]string{
		fieldImage:    w.Spec.Image,
		fieldEnv:      w.Spec.Env["PLAIN"],
		fieldModelEnv: strings.Join(w.Spec.ModelEnv, ","),
		fieldLabel:    w.Labels["team"],
		fieldGrace:    grace,
		fieldPolicy:   fmt.Sprintf("%s/%d", w.Spec.CrashPolicy.Restart, w.Spec.CrashPolicy.MaxRetries),
		fieldModel:    w.Model,
		fieldParked:   fmt.Sprint(w.Parked),
	}
}

// notVisible stands for a value that nothing shows.
const notVisible = "\x00not visible"

// ownValue returns the value of a workspace's own secret: what its container
// gets, if it has one of its own.
func ownValue(d *daemon.Daemon, id, key string, merged map[string]string) string {
	if _, err := d.Store.Secret(store.Scope{WorkspaceID: id}, key); err != nil {
		return ""
	}
	value, ok := merged[key]
	if !ok {
		return notVisible
	}
	return value
}
