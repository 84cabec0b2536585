package rows

import "time"

func init() { All = append(All, Row{Name: "start", What: "scratch", Limit: 2 * time.Minute, Run: startStopped}) }
