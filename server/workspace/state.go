package workspace

import "github.com/workspaced/workspaced/store"

// State is what a workspace does, in the words of workspace.v1.WorkspaceState
// without its prefix.
type State string

// The states; see workspace.v1.WorkspaceState.
const (
	StateProvisioning State = "PROVISIONING"
	StateRunning      State = "RUNNING"
	StateDegraded     State = "DEGRADED"
	StateBackoff      State = "BACKOFF"
	StateExited       State = "EXITED"
	StateExhausted    State = "EXHAUSTED"
	StateStopped      State = "STOPPED"
	StateDeleting     State = "DELETING"
)

// StateOf derives the state from the record, and whether the container is not
// yet what the record asks for.
func StateOf(w *store.Workspace) (state State, reconciling bool) {
	st := &w.Status
	switch {
	case w.Deleting != nil:
		return StateDeleting, true
	case w.Parked && st.Running == nil:
		return StateStopped, false
	case w.Parked:
		return StateRunning, true
	}
	pending := w.Pending()
	switch {
	case st.Running != nil && pending && st.Failure != nil && st.Failure.Generation > st.ObservedGeneration:
		return StateDegraded, true
	case st.Running != nil:
		return StateRunning, pending
	case !pending && w.End() != "":
		return State(w.End()), false
	case st.Failure != nil && st.StartingGeneration == 0:
		return StateBackoff, true
	default:
		return StateProvisioning, true
	}
}
