"""Variables by which the processes of a run are told where its things are."""

STORE = "FEDLORU_STORE"  # the directory of what clients hold, see `fedloru_flwr.store`
DATA = "FEDLORU_DATA"  # the file of the run's data, see `fedloru_flwr.data.kept`
SUPERNODES = "FEDLORU_SUPERNODES"  # how many SuperNodes a simulation has, where whoever started it says so
