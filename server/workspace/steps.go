package workspace

// The steps that an actor does itself, beside those of store and runtime, in
// the order of a cycle. Config.Around does each of them.
const (
	stepSecretsRead    = "secrets.read"    // every secret is opened before anything is touched
	stepSecretsLate    = "secrets.late"    // the values that the container gets
	stepSecretsLive    = "secrets.live"    // the values that a running container takes in
	stepStatusStarting = "status.starting" // a cycle begins
	stepStatusObserved = "status.observed" // the container runs
	stepStatusRotated  = "status.rotated"  // the container has taken in what came
	stepStatusExit     = "status.exit"     // it ended by itself
	stepStatusStopped  = "status.stopped"  // it was ended
	stepStatusFailure  = "status.failure"  // the cycle failed
	stepStatusSettled  = "status.settled"  // the status speaks of nothing that is over
	stepStatusDeleted  = "status.deleted"  // nothing is left but the record
)

// Steps are the names of all steps.
var Steps = []string{
	stepSecretsRead, stepSecretsLate, stepSecretsLive,
	stepStatusStarting, stepStatusObserved, stepStatusRotated, stepStatusExit, stepStatusStopped, stepStatusFailure, stepStatusSettled, stepStatusDeleted,
}
